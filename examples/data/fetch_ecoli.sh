#!/usr/bin/env bash
# Gets the genome of Escherichia coli K-12 MG1655 (4,639,675 bases) from the Debian package
# ragout-examples (18 MB) into ecoli-mg1655.fasta.gz beside this script. Needs apt-get and dpkg, no
# root: without package lists it makes private ones.
set -euo pipefail

readonly target="$(cd "$(dirname "$0")" && pwd)/ecoli-mg1655.fasta.gz"
readonly member=usr/share/doc/ragout/examples/E.Coli/references/MG1655-K12.fasta.gz
readonly bases=4639675

fail() { echo "fetch_ecoli.sh: $*" >&2; exit 1; }

count_bases() { gzip -dc "$1" | grep -v '^>' | tr -d '\r\n' | wc -c | tr -d ' '; }

if [ -f "$target" ] && [ "$(count_bases "$target")" = "$bases" ]; then
  echo "$target is there already"
  exit 0
fi
for tool in apt-get dpkg; do
  command -v "$tool" > /dev/null || fail "$tool was not found: this needs Debian or Ubuntu. Elsewhere" \
    "put the FASTA file of GenBank U00096.2 (gzip) at $target"
done

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
if ! apt-get download -qq ragout-examples 2> apt.log; then
  mkdir -p lists/partial cache/archives/partial
  private=(-o "Dir::State::lists=$folder/lists" -o "Dir::Cache=$folder/cache")
  apt-get "${private[@]}" update -qq > apt.log 2>&1 &&
    apt-get "${private[@]}" download -qq ragout-examples 2>> apt.log ||
    fail "apt-get could not get ragout-examples: $(tail -n 1 apt.log)"
fi
dpkg -x ragout-examples_*.deb package
got="$(count_bases "package/$member")"
[ "$got" = "$bases" ] || fail "the genome has $got bases, expected $bases"
cp "package/$member" "$target.part"
mv "$target.part" "$target"
echo "wrote $target ($got bases)"
