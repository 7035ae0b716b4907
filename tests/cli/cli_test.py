"""The program from end to end on tiny models: what it prints, where, and its exit codes.

    python tests/cli/cli_test.py build/sarissa
"""

import gzip
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import unittest

PROGRAM = None

CONFIG = """
[model]
pattern = "SE MR LI PHX SWA ATT"
dim = 32
heads = 2
swa_window = 16
mr_taps = 16

[data]
train = "{folder}/text.txt"

[train]
output = "{folder}/run"
steps = 20
batch = 4
context = 32
device = "cpu"
checkpoint_every = 10

[optim]
warmup = 2

[eval]
every = 10
tokens = 512
batch = 4

[log]
every = 1
tensorboard = false
"""


def run(*arguments, code=0):
    done = subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, text=True,
                          errors="replace")
    if done.returncode != code:
        raise AssertionError(f"sarissa {' '.join(map(str, arguments))}: exit code {done.returncode}, "
                             f"expected {code}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return done


def json_lines(*arguments):
    return [json.loads(line) for line in run(*arguments, "--json").stdout.splitlines()]


class CliTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.scratch = tempfile.TemporaryDirectory()
        cls.folder = pathlib.Path(cls.scratch.name)
        (cls.folder / "text.txt").write_text(
            "".join(f"Line {i} says that {i * i} is the square of {i}.\n" for i in range(400)))
        (cls.folder / "config.toml").write_text(CONFIG.format(folder=cls.folder))
        (cls.folder / "dna.fasta").write_text(">one first record\nACGTACGTAC\nGTTN\n>two\nGGAATTCC\n")
        (cls.folder / "lines.txt").write_text("first line\nsecond line\n")
        (cls.folder / "texts.jsonl").write_text(
            '{"id": "a", "text": "g\u00e9n\u00e9"}\n{"id": "b", "text": "plain"}\n')
        run("train", cls.folder / "config.toml")
        cls.model = cls.folder / "run" / "model"

    @classmethod
    def tearDownClass(cls):
        cls.scratch.cleanup()

    def score(self, name, *options):
        return json_lines("score", "--model", self.model, "--device", "cpu", "--input",
                          self.folder / name, *options)

    def error(self, *arguments, code=2):
        """The one line that a failing command writes."""
        done = run(*arguments, code=code)
        self.assertEqual(done.stdout, "")
        lines = done.stderr.splitlines()
        self.assertEqual(len(lines), 1, done.stderr)
        return lines[0]

    # help and bad usage

    def test_help_of_every_command_has_an_example(self):
        for command in ("train", "eval", "generate", "score", "inspect", "init", "selftest"):
            self.assertIn(f"sarissa {command}", run(command, "--help").stdout.split("Example")[1])
        for command in ("prepare", "inspect"):
            self.assertIn("sarissa data", run("data", command, "--help").stdout)
        self.assertIn("sarissa bench ops --op",
                      run("bench", "ops", "--help").stdout.split("Example")[1])
        self.assertIn("generate", run("--help").stdout)

    def test_version(self):
        self.assertRegex(run("--version").stdout, r"^sarissa \d.*commit .*torch 2\.11\.0.*CUDA")

    def test_unknown_words_name_the_nearest(self):
        self.assertIn("'generate'", self.error("genrate"))
        self.assertIn("'--prompt'", self.error("generate", "--model", "x", "--promt", "y"))
        self.assertIn("prepare", self.error("data", "prepar"))
        self.assertIn("'--model'", self.error("score", "--modle=x", "--input", "y", "--model", "z"))

    def test_bad_values_are_bad_usage(self):
        self.assertIn("no command", self.error())
        self.assertIn("--model", self.error("eval", "--data", self.folder / "text.txt"))
        self.assertIn("--tokens 'many'",
                      self.error("generate", "--model", self.model, "--prompt", "x", "-n", "many"))
        for option, value in (("--dtype", "float8"), ("--device", "tpu"), ("--top-p", "2"),
                              ("--temperature", "-1"), ("--top-k", "-1"), ("-n", "-1")):
            line = self.error("generate", "--model", self.model, "--prompt", "x", option, value)
            self.assertIn(value.lstrip("-"), line)
        self.assertIn("--prompt", self.error("generate", "--model", self.model))
        self.assertIn("--per-token", self.error("score", "--model", self.model, "--input",
                                                self.folder / "dna.fasta", "--per-token",
                                                "--reverse-complement"))
        self.assertIn("evo2-7b", self.error("inspect", "evo2-7bb"))
        self.assertIn("quickstart", self.error("init", "--preset", "quickstar", self.folder / "new"))
        self.assertIn("not empty", self.error("init", "--preset", "quickstart", self.folder))

    def test_unknown_config_keys_are_bad_usage(self):
        config = self.folder / "config.toml"
        self.assertIn("lr", self.error("train", config, "--optim.lrr=1", "--dry-run"))
        self.assertIn("optim", self.error("train", config, "--optin.lr=1", "--dry-run"))
        self.assertIn("abc", self.error("train", config, "--optim.lr=abc", "--dry-run"))
        bad = self.folder / "bad.toml"
        bad.write_text("[train]\nstepz = 3\n")
        line = self.error("train", bad)
        self.assertIn("steps", line)
        self.assertIn("bad.toml:2", line)

    def test_failures_exit_1_with_one_line(self):
        missing = self.folder / "missing"
        self.assertIn("missing", self.error("generate", "--model", missing, "--prompt", "x", code=1))
        done = run("score", "--model", self.model, "--input", missing, code=1)
        self.assertIn("missing", done.stderr.splitlines()[-1])
        broken = self.folder / "broken"
        broken.mkdir()
        (broken / "config.json").write_text((self.model / "config.json").read_text())
        weights = (self.model / "model.safetensors").read_bytes()
        (broken / "model.safetensors").write_bytes(weights[:1000])
        self.assertIn("model.safetensors",
                      self.error("generate", "--model", broken, "--prompt", "x", code=1))

    def test_full_disk_is_a_failure(self):
        with open("/dev/full", "w") as full:
            done = subprocess.run([PROGRAM, "inspect", "evo2-7b"], stdout=full,
                                  stderr=subprocess.PIPE, text=True)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("stdout", done.stderr)

    # train

    def test_train_writes_a_run_directory(self):
        run_folder = self.folder / "run"
        metrics = [json.loads(line) for line in
                   (run_folder / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in metrics if "loss" in line]
        self.assertLess(losses[-1], losses[0] - 0.5)
        self.assertTrue((run_folder / "config.toml").exists())
        self.assertTrue((self.model / "config.json").exists())
        self.assertTrue((self.model / "model.safetensors").exists())

    def test_resume_continues_bit_for_bit(self):
        whole, halves = self.folder / "whole", self.folder / "halves"
        config = self.folder / "config.toml"
        run("train", config, f"--train.output={whole}", "--optim.schedule=constant")
        run("train", config, f"--train.output={halves}", "--optim.schedule=constant",
            "--train.steps=10")
        run("train", config, f"--train.output={halves}", "--optim.schedule=constant", "--resume")
        self.assertEqual((whole / "model" / "model.safetensors").read_bytes(),
                         (halves / "model" / "model.safetensors").read_bytes())

    def test_dry_run_writes_nothing(self):
        target = self.folder / "never"
        run("train", self.folder / "config.toml", f"--train.output={target}", "--dry-run")
        self.assertFalse(target.exists())

    # eval

    def test_eval(self):
        [result] = json_lines("eval", "--model", self.model, "--data", self.folder / "text.txt",
                              "--device", "cpu", "--context", 32)
        for key in ("loss", "bits_per_byte", "perplexity"):
            self.assertIn(key, result)
        self.assertAlmostEqual(result["bits_per_byte"], result["loss"] / math.log(2), places=5)
        self.assertAlmostEqual(result["perplexity"], math.exp(result["loss"]), delta=1e-3)
        self.assertLess(result["loss"], math.log(256) - 1)
        plain = run("eval", "--model", self.model, "--data", self.folder / "text.txt",
                    "--device", "cpu", "--context", 32).stdout
        self.assertIn("bits per byte", plain)

    # init, inspect

    def test_init_depends_on_the_seed_alone(self):
        weights = []
        for index, seed in enumerate((1, 1, 2)):
            folder = self.folder / f"init{index}"
            run("init", "--preset", "quickstart", folder, "--seed", seed)
            weights.append((folder / "model.safetensors").read_bytes())
        self.assertEqual(weights[0], weights[1])
        self.assertNotEqual(weights[0], weights[2])

    def test_inspect_counts_what_a_directory_holds(self):
        [result] = json_lines("inspect", self.model)
        header = (self.model / "model.safetensors").read_bytes()
        size = int.from_bytes(header[:8], "little")
        tensors = json.loads(header[8:8 + size])
        tensors.pop("__metadata__", None)
        self.assertEqual(result["parameters"],
                         sum(math.prod(tensor["shape"]) for tensor in tensors.values()))
        self.assertEqual(result["layers"], 6)
        self.assertEqual(set(result["mixers"]), {"SE", "MR", "LI", "PHX", "SWA", "ATT"})
        self.assertEqual(result["config"]["dim"], 32)
        self.assertEqual(result["kv_bytes_per_token"]["float32"], 2 * 32 * 4)

    def test_inspect_knows_the_published_sizes(self):
        for preset, parameters, layers, size in EVO2:
            with self.subTest(preset):
                [result] = json_lines("inspect", preset)
                self.assertEqual(result["parameters"], parameters)
                self.assertEqual(result["layers"], layers)
                if size is not None:
                    # The files also hold the embedding twice, and the 64 rotary frequencies of each
                    # attention layer.
                    size -= 2 * 512 * result["config"]["dim"]
                    size -= 2 * 64 * result["mixers"]["ATT"]["layers"]
                    self.assertEqual(result["bytes"]["bfloat16"], size)
        self.assertIn("parameters", run("inspect", "evo2-7b").stdout)

    # generate

    def test_generate(self):
        arguments = ("generate", "--model", self.model, "--device", "cpu", "-n", 12, "--seed", 5)
        [result] = json_lines(*arguments, "--prompt", "Line 7 ")
        self.assertEqual(result["prompt"], "Line 7 ")
        self.assertEqual(len(result["tokens"]), 12)
        self.assertEqual(len(result["logprobs"]), 12)
        self.assertTrue(all(value <= 0 for value in result["logprobs"]))
        self.assertTrue(all(0 <= token < 256 for token in result["tokens"]))
        self.assertEqual(bytes(result["tokens"]).decode(errors="replace"), result["text"])
        self.assertEqual(json_lines(*arguments, "--prompt", "Line 7 "), [result])
        plain = run(*arguments, "--prompt", "Line 7 ").stdout
        self.assertTrue(plain.startswith("Line 7 "))

    def test_generate_from_files_and_several_prompts(self):
        arguments = ("generate", "--model", self.model, "--device", "cpu", "-n", 4)
        both = json_lines(*arguments, "--prompt", "one", "--prompt", "three")
        self.assertEqual([line["prompt"] for line in both], ["one", "three"])
        self.assertEqual(json_lines(*arguments, "--prompt", "three"), [both[1]])
        from_jsonl = json_lines(*arguments, "--prompt-file", self.folder / "texts.jsonl")
        self.assertEqual([line["prompt"] for line in from_jsonl], ["g\u00e9n\u00e9", "plain"])
        [whole] = json_lines(*arguments, "--prompt-file", self.folder / "lines.txt")
        self.assertEqual(whole["prompt"], "first line\nsecond line")

    # score

    def test_score_counts_terms(self):
        one, two = self.score("dna.fasta")
        self.assertEqual((one["id"], one["terms"]), ("one", 13))
        self.assertEqual((two["id"], two["terms"]), ("two", 7))
        self.assertAlmostEqual(one["mean"], one["sum"] / 13, places=9)
        self.assertNotIn("logprobs", one)
        self.assertEqual([line["terms"] for line in self.score("dna.fasta", "--bos")], [14, 8])
        self.assertEqual([line["terms"] for line in self.score("texts.jsonl")], [5, 4])
        self.assertEqual([line["id"] for line in self.score("texts.jsonl")], ["a", "b"])
        self.assertEqual([line["terms"] for line in self.score("lines.txt")], [9, 10])

    def test_score_per_token_sums_up(self):
        for options in ((), ("--bos",), ("--chunk", 3)):
            for line in self.score("dna.fasta", "--per-token", *options):
                self.assertEqual(len(line["logprobs"]), line["terms"])
                self.assertAlmostEqual(sum(line["logprobs"]), line["sum"], places=3)

    def test_score_reads_gzip(self):
        packed = self.folder / "packed.fasta.gz"
        packed.write_bytes(gzip.compress((self.folder / "dna.fasta").read_bytes()))
        self.assertEqual(self.score("packed.fasta.gz"), self.score("dna.fasta"))

    def test_score_averages_strands(self):
        (self.folder / "other.fasta").write_text(">one\nNAACGTACGTACGT\n>two\nGGAATTCC\n")
        forward, other = self.score("dna.fasta"), self.score("other.fasta")
        for strand, reverse, both in zip(forward, other,
                                         self.score("dna.fasta", "--reverse-complement")):
            self.assertAlmostEqual(both["sum"], (strand["sum"] + reverse["sum"]) / 2, places=4)
            self.assertEqual(both["terms"], strand["terms"])

    def test_score_upper_cases_fasta(self):
        (self.folder / "masked.fasta").write_text(">one\nacgtACGTACGTTN\n>two\nGGAATTCC\n")
        self.assertEqual(self.score("masked.fasta"), self.score("dna.fasta"))
        self.assertNotEqual(self.score("masked.fasta", "--keep-case")[0]["sum"],
                            self.score("dna.fasta")[0]["sum"])

    def test_score_prints_a_table(self):
        lines = run("score", "--model", self.model, "--device", "cpu", "--input",
                    self.folder / "dna.fasta").stdout.splitlines()
        self.assertEqual(lines[0].split("\t"), ["id", "terms", "sum", "mean"])
        self.assertEqual(len(lines), 3)

    # data, selftest

    def test_data_inspect_and_prepare(self):
        prepared = self.folder / "prepared"
        [written] = json_lines("data", "prepare", self.folder / "dna.fasta", "--output", prepared)
        [source] = json_lines("data", "inspect", self.folder / "dna.fasta")
        [result] = json_lines("data", "inspect", f"{prepared}.bin")
        self.assertEqual(source["documents"], 2)
        self.assertEqual(result["documents"], 2)
        self.assertEqual(result["tokens"], written["tokens"])

    def test_selftest_passes(self):
        results = json_lines("selftest", "--device", "cpu")
        self.assertGreater(len(results), 100)
        for key in ("operator", "check", "shape", "dtype", "error", "bound", "pass"):
            self.assertIn(key, results[0])
        self.assertTrue(all(result["pass"] for result in results))


# The published Evo 2 models: parameters, layers, and the bytes of the tensors in their bfloat16 files,
# which hold the modal filters in float32. The larger files keep more than the filters in float32.
EVO2 = (
    ("evo2-1b-base", 1_107_989_760, 25, 2_218_806_272),
    ("evo2-7b-base", 6_481_059_584, 32, 12_968_673_408),
    ("evo2-7b-262k", 6_481_059_584, 32, 12_968_673_408),
    ("evo2-7b", 6_581_722_880, 32, 13_170_000_000),
    ("evo2-20b", 19_738_780_160, 24, None),
    ("evo2-40b-base", 40_331_142_144, 50, None),
    ("evo2-40b", 41_117_574_144, 50, None),
)


if __name__ == "__main__":
    PROGRAM = str(pathlib.Path(sys.argv.pop(1)).resolve())
    unittest.main(verbosity=2)
