#include "sarissa/cli/op_cases.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <tuple>

#include "sarissa/base/error.h"
#include "sarissa/ops/dispatch.h"
#include "sarissa/ops/ops.h"

namespace sarissa::cli {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr double kDecayMax = 0.95;
constexpr double kNormEps = 1e-6;
constexpr int64_t kHeadWidth = 16, kGroupWidth = 16, kModes = 16;
constexpr int64_t kPartRuns = 3;                  // heads or groups in a part, or as many channels
constexpr int64_t kPartSteps = int64_t{1} << 23;  // steps in a part, of all its channels together
constexpr int64_t kPartRows = 2048;               // rows in a part of an operator on rows

Input normal(std::vector<int64_t> shape) { return {.shape = std::move(shape)}; }
Input sequence(std::vector<int64_t> shape) { return {.shape = std::move(shape), .sequence = true}; }
Input uniform(std::vector<int64_t> shape, double low, double high) {
  return {.shape = std::move(shape), .range = {{low, high}}};
}
Input as_sequence(Input input) {
  input.sequence = true;
  return input;
}
Input as_fp32(Input input) {
  input.fp32 = true;
  return input;
}

template <class State>
std::optional<State> given(const Tensors* state, const std::function<State(const Tensors&)>& make) {
  if (state == nullptr || state->empty()) return std::nullopt;
  return make(*state);
}

void put(Tensors* state, Tensors next) {
  if (state != nullptr) *state = std::move(next);
}

std::optional<ops::SwrState> swr_state(const Tensors* state) {
  return given<ops::SwrState>(state, [](const Tensors& s) {
    return ops::SwrState{s[0], s[1], s[2], s[3]};
  });
}

std::optional<ops::HyenaState> hyena_state(const Tensors* state) {
  return given<ops::HyenaState>(state, [](const Tensors& s) {
    return ops::HyenaState{s[0], s[1]};
  });
}

OptionalTensor tensor_state(const Tensors* state) {
  return given<Tensor>(state, [](const Tensors& s) { return s[0]; });
}

Tensors keep_inputs(const Tensors& inputs, const Tensors&) { return inputs; }

// `wanted` of `count` things, evenly spread, with the first and the last.
std::vector<int64_t> samples(int64_t count, int64_t wanted) {
  if (count <= wanted) wanted = count;
  std::vector<int64_t> result;
  for (int64_t i = 0; i < wanted; ++i) {
    result.push_back(wanted == 1 ? 0 : i * (count - 1) / (wanted - 1));
  }
  return result;
}

// The members of the given runs of `width` neighbours, each shifted by `offset`.
std::vector<int64_t> members(const std::vector<int64_t>& runs, int64_t width, int64_t offset = 0) {
  std::vector<int64_t> result;
  for (const int64_t run : runs) {
    for (int64_t i = 0; i < width; ++i) result.push_back(offset + run * width + i);
  }
  return result;
}

void append(std::vector<int64_t>& list, const std::vector<int64_t>& more) {
  list.insert(list.end(), more.begin(), more.end());
}

// ---- sliding window recurrences

Case swr_case(int64_t batch, int64_t length, int64_t heads, int64_t width, int64_t window) {
  return {.op = "swr",
          .shape = str("B", batch, " L", length, " H", heads, " P", width, " window ", window),
          .inputs = {as_sequence(uniform({batch, length, heads}, 0.0, 1.0)),
                     sequence({batch, length, heads, width})},
          .call = {.run =
                       [window](const Tensors& in, Tensors* state) {
                         auto [x, next] = ops::swr(in[0], in[1], window, swr_state(state));
                         put(state, {next.w, next.r, next.v, next.index});
                         return Tensors{x};
                       }},
          .has_state = true};
}

using Phalanx = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
    const Tensor& abcv, int64_t heads, int64_t kv_heads, int64_t window, double decay_max,
    const OptionalTensor& w, const OptionalTensor& r, const OptionalTensor& v,
    const OptionalTensor& index);
using PhalanxBwd = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor& abcv, int64_t heads, int64_t kv_heads, int64_t window, double decay_max,
    const OptionalTensor& w, const OptionalTensor& r, const OptionalTensor& v,
    const OptionalTensor& index, const OptionalTensor& saved, const Tensor& dy,
    const OptionalTensor& dw, const OptionalTensor& dr, const OptionalTensor& dv);

Operator phalanx_operator(int64_t heads, int64_t kv_heads, int64_t window) {
  return {.run =
              [=](const Tensors& in, Tensors* state) {
                auto [y, next] =
                    ops::phalanx(in[0], heads, kv_heads, window, kDecayMax, swr_state(state));
                put(state, {next.w, next.r, next.v, next.index});
                return Tensors{y};
              },
          .save =
              [=](const Tensors& in, const Tensors&) {
                static const auto op = ops::find_operator<Phalanx>("sarissa::phalanx");
                constexpr auto none = std::nullopt;
                return Tensors{in[0], std::get<5>(op.call(in[0], heads, kv_heads, window, kDecayMax,
                                                          none, none, none, none))};
              },
          .bwd =
              [=](const Tensors& saved, const Tensors& cotangents) {
                static const auto op = ops::find_operator<PhalanxBwd>("sarissa::phalanx_bwd");
                constexpr auto none = std::nullopt;
                return Tensors{
                    std::get<0>(op.call(saved[0], heads, kv_heads, window, kDecayMax, none, none,
                                        none, none, saved[1], cotangents[0], none, none, none))};
              },
          .saves_detail = true};
}

// Some kv heads with the heads that use them.
Part phalanx_part(int64_t heads, int64_t kv_heads, int64_t width, int64_t window) {
  const std::vector<int64_t> kv = samples(kv_heads, kPartRuns);
  const std::vector<int64_t> q = members(kv, heads / kv_heads);
  const auto kv_count = static_cast<int64_t>(kv.size()), count = static_cast<int64_t>(q.size());
  const int64_t b = heads, c = b + kv_heads * width, v = c + kv_heads * width;
  std::vector<int64_t> channels = q;  // [a: H | b: Hkv*P | c: Hkv*P | v: H*P]
  append(channels, members(kv, width, b));
  append(channels, members(kv, width, c));
  append(channels, members(q, width, v));
  return {.op = phalanx_operator(count, kv_count, window),
          .inputs = {{2, channels, {count, kv_count * width, kv_count * width, count * width}}},
          .output = {2, members(q, width)}};
}

Case phalanx_case(int64_t batch, int64_t length, int64_t heads, int64_t kv_heads, int64_t width,
                  int64_t window) {
  const int64_t packed = heads + 2 * kv_heads * width + heads * width;
  return {.op = "phalanx",
          .shape = str("B", batch, " L", length, " H", heads, "/", kv_heads, " P", width,
                       " window ", window),
          .inputs = {sequence({batch, length, packed})},
          .call = phalanx_operator(heads, kv_heads, window),
          .has_state = true,
          .parts = {phalanx_part(heads, kv_heads, width, window)}};
}

// ---- convolutions

Case fir_case(int64_t batch, int64_t length, int64_t dim, int64_t groups, int64_t taps) {
  return {.op = "fir",
          .shape = str("B", batch, " L", length, " D", dim, " G", groups, " W", taps),
          .inputs = {sequence({batch, length, dim}), normal({groups, taps})},
          .call = {.run =
                       [](const Tensors& in, Tensors* state) {
                         auto [y, next] = ops::fir(in[0], in[1], tensor_state(state));
                         put(state, {next});
                         return Tensors{y};
                       }},
          .has_state = true};
}

OptionalTensor optional_input(const Tensors& in, size_t index) {
  return index < in.size() ? OptionalTensor(in[index]) : std::nullopt;
}

using HyenaFirBwd = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
    const Tensor& dy, const OptionalTensor& d_featurizer_state, const OptionalTensor& d_inner_state,
    const Tensor& z, const Tensor& featurizer, const Tensor& taps, const OptionalTensor& skip,
    const OptionalTensor& featurizer_state, const OptionalTensor& inner_state);

// Inputs z, featurizer, taps and, where there is one, skip.
Operator hyena_fir_operator() {
  return {.run =
              [](const Tensors& in, Tensors* state) {
                auto [y, next] =
                    ops::hyena_fir(in[0], in[1], in[2], optional_input(in, 3), hyena_state(state));
                put(state, {next.featurizer, next.inner});
                return Tensors{y};
              },
          .save = keep_inputs,
          .bwd =
              [](const Tensors& saved, const Tensors& cotangents) {
                static const auto op = ops::find_operator<HyenaFirBwd>("sarissa::hyena_fir_bwd");
                constexpr auto none = std::nullopt;
                const auto [dz, d_featurizer, d_taps, d_skip, d_featurizer_state, d_inner_state] =
                    op.call(cotangents[0], none, none, saved[0], saved[1], saved[2],
                            optional_input(saved, 3), none, none);
                Tensors gradients = {dz, d_featurizer, d_taps};
                if (saved.size() > 3) gradients.push_back(d_skip);
                return gradients;
              }};
}

// The channels of some groups in each third of z, with their parameters; `parameters` have a row
// for each group. A channel has `steps`: very long ones make it fewer groups.
Part hyena_part(Operator op, int64_t dim, int64_t groups, int64_t parameters, bool skip,
                int64_t steps) {
  constexpr int64_t kFewest = 2;  // the first and the last
  const int64_t group_width = dim / groups;
  const int64_t channels_wanted =
      std::min(kPartRuns * kGroupWidth, kPartSteps / std::max<int64_t>(1, steps));
  const std::vector<int64_t> chosen =
      samples(groups, std::max(kFewest, channels_wanted / group_width));
  const std::vector<int64_t> channels = members(chosen, group_width);
  const auto count = static_cast<int64_t>(channels.size());
  std::vector<int64_t> thirds;
  for (int64_t third = 0; third < 3; ++third) {
    append(thirds, members(chosen, group_width, third * dim));
  }
  Part part = {.op = std::move(op),
               .inputs = {{2, thirds, {count, count, count}}, {0, thirds}},
               .output = {2, channels}};
  for (int64_t i = 0; i < parameters; ++i) part.inputs.push_back({0, chosen});
  if (skip) part.inputs.push_back({0, channels});
  return part;
}

Case hyena_fir_case(int64_t batch, int64_t length, int64_t dim, int64_t groups, int64_t taps,
                    bool skip) {
  Case result = {
      .op = "hyena_fir",
      .shape = str("B", batch, " L", length, " D", dim, " G", groups, " W", taps),
      .inputs = {sequence({batch, length, 3 * dim}), normal({3 * dim, 3}), normal({groups, taps})},
      .call = hyena_fir_operator(),
      .has_state = true,
      .memory = taps - 1,
      .parts = {hyena_part(hyena_fir_operator(), dim, groups, 1, skip, batch * length)}};
  if (skip) result.inputs.push_back(normal({dim}));
  return result;
}

Case modal_case(int64_t batch, int64_t length, int64_t dim, int64_t groups, int64_t modes) {
  return {.op = "modal",
          .shape = str("B", batch, " L", length, " D", dim, " G", groups, " N", modes),
          .inputs = {sequence({batch, length, dim}), as_fp32(uniform({groups, modes}, -2.0, -0.01)),
                     as_fp32(normal({groups, modes})), normal({dim})},
          .call = {.run =
                       [](const Tensors& in, Tensors* state) {
                         auto [y, next] =
                             ops::modal(in[0], in[1], in[2], in[3], tensor_state(state));
                         put(state, {next});
                         return Tensors{y};
                       }},
          .has_state = true};
}

using HyenaModal = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor& z, const Tensor& featurizer, const Tensor& log_poles, const Tensor& residues,
    const OptionalTensor& skip, const OptionalTensor& featurizer_state,
    const OptionalTensor& inner_state, bool save);
using HyenaModalBwd = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
    const Tensor& dy, const OptionalTensor& d_featurizer_state, const OptionalTensor& d_inner_state,
    const Tensor& z, const Tensor& featurizer, const Tensor& log_poles, const Tensor& residues,
    const OptionalTensor& skip, const OptionalTensor& featurizer_state,
    const OptionalTensor& inner_state, const OptionalTensor& saved);

Operator hyena_modal_operator() {
  return {.run =
              [](const Tensors& in, Tensors* state) {
                auto [y, next] =
                    ops::hyena_modal(in[0], in[1], in[2], in[3], in[4], hyena_state(state));
                put(state, {next.featurizer, next.inner});
                return Tensors{y};
              },
          .save =
              [](const Tensors& in, const Tensors&) {
                static const auto op = ops::find_operator<HyenaModal>("sarissa::hyena_modal");
                Tensors saved = in;
                saved.push_back(std::get<3>(
                    op.call(in[0], in[1], in[2], in[3], in[4], std::nullopt, std::nullopt, true)));
                return saved;
              },
          .bwd =
              [](const Tensors& saved, const Tensors& cotangents) {
                static const auto op =
                    ops::find_operator<HyenaModalBwd>("sarissa::hyena_modal_bwd");
                constexpr auto none = std::nullopt;
                const auto [dz, d_featurizer, d_log_poles, d_residues, d_skip, d_featurizer_state,
                            d_inner_state] =
                    op.call(cotangents[0], none, none, saved[0], saved[1], saved[2], saved[3],
                            saved[4], none, none, saved[5]);
                return Tensors{dz, d_featurizer, d_log_poles, d_residues, d_skip};
              },
          .saves_detail = true};
}

Case hyena_modal_case(int64_t batch, int64_t length, int64_t dim, int64_t groups, int64_t modes) {
  return {.op = "hyena_modal",
          .shape = str("B", batch, " L", length, " D", dim, " G", groups, " N", modes),
          .inputs = {sequence({batch, length, 3 * dim}), normal({3 * dim, 3}),
                     as_fp32(uniform({groups, modes}, -2.0, -0.01)),
                     as_fp32(normal({groups, modes})), normal({dim})},
          .call = hyena_modal_operator(),
          .has_state = true,
          .parts = {hyena_part(hyena_modal_operator(), dim, groups, 2, true, batch * length)}};
}

// ---- operators on rows

using RmsNormBwd = std::tuple<Tensor, Tensor>(const Tensor& dy, const OptionalTensor& dsum,
                                              const Tensor& sum, const Tensor& weight, double eps);

Operator norm_operator() {
  return {.run =
              [](const Tensors& in, Tensors*) {
                auto [y, sum] = ops::residual_rms_norm(in[0], in[1], in[2], kNormEps);
                return Tensors{y, sum};
              },
          .save =
              [](const Tensors& in, const Tensors& out) {
                return Tensors{out[1], in[2]};
              },  // sum, weight
          .bwd =
              [](const Tensors& saved, const Tensors& cotangents) {
                static const auto op = ops::find_operator<RmsNormBwd>("sarissa::rms_norm_bwd");
                const auto [dx, dweight] =
                    op.call(cotangents[0], cotangents[1], saved[0], saved[1], kNormEps);
                return Tensors{dx, dx, dweight};
              }};
}

Case norm_case(int64_t rows, int64_t dim) {
  Case result = {.op = "residual_rms_norm",
                 .shape = str("rows ", rows, " D", dim),
                 .inputs = {normal({rows, dim}), normal({rows, dim}), normal({dim})},
                 .call = norm_operator()};
  // All of the rows, since every one of them counts in the gradient of the weight.
  for (int64_t begin = 0; begin < rows; begin += kPartRows) {
    const Selection some = {0, members({0}, std::min(kPartRows, rows - begin), begin)};
    result.parts.push_back({.op = norm_operator(), .inputs = {some, some, {}}, .output = some});
  }
  return result;
}

using GluBwd = Tensor(const Tensor& dy, const Tensor& gate_up, c10::string_view gate);

Operator glu_operator(const std::string& gate) {
  return {.run = [gate](const Tensors& in,
                        Tensors*) { return Tensors{ops::glu(in[0], ops::parse_gate(gate))}; },
          .save = keep_inputs,
          .bwd =
              [gate](const Tensors& saved, const Tensors& cotangents) {
                static const auto op = ops::find_operator<GluBwd>("sarissa::glu_bwd");
                return Tensors{op.call(cotangents[0], saved[0], gate)};
              }};
}

Case glu_case(int64_t rows, int64_t dim, const std::string& gate) {
  const std::vector<int64_t> chosen = samples(rows, kPartRows);
  return {
      .op = "glu",
      .shape = str("rows ", rows, " F", dim, " ", gate),
      .inputs = {normal({rows, 2 * dim})},
      .call = glu_operator(gate),
      .parts = {
          {.op = glu_operator(gate), .inputs = {{0, chosen, {dim, dim}}}, .output = {0, chosen}}}};
}

Case rope_case(int64_t batch, int64_t length, int64_t heads, int64_t width) {
  return {.op = "rope",
          .shape = str("B", batch, " L", length, " H", heads, " P", width),
          .inputs = {sequence({batch, length, heads, width})},
          .call = {.run =
                       [width](const Tensors& in, Tensors* state) {
                         const int64_t position =
                             state == nullptr || state->empty() ? 0 : (*state)[0].item<int64_t>();
                         put(state, {at::tensor({position + in[0].size(1)}, at::kLong)});
                         return Tensors{ops::rope(
                             in[0], ops::rope_inverse_frequencies(width, 10000.0, in[0].device()),
                             position, 1.0)};
                       }},
          .has_state = true};
}

Case attention_case(int64_t batch, int64_t length, int64_t heads, int64_t kv_heads, int64_t width,
                    int64_t window) {
  return {.op = "attention",
          .shape = str("B", batch, " L", length, " H", heads, "/", kv_heads, " P", width,
                       " window ", window),
          .inputs = {sequence({batch, length, heads, width}),
                     sequence({batch, length, kv_heads, width}),
                     sequence({batch, length, kv_heads, width})},
          .call = {.run =
                       [window](const Tensors& in, Tensors* state) {
                         Tensor k = in[1], v = in[2];
                         if (state != nullptr && !state->empty()) {
                           k = at::cat({(*state)[0], k}, 1);
                           v = at::cat({(*state)[1], v}, 1);
                         }
                         put(state, {k, v});
                         return Tensors{ops::attention(in[0], k, v, window)};
                       }},
          .has_state = true};
}

Tensor some_targets(int64_t rows, int64_t vocabulary, at::Device device) {
  return (at::arange(rows, at::kLong) * 7919 % vocabulary).to(device);
}

Case cross_entropy_case(int64_t rows, int64_t vocabulary) {
  return {
      .op = "cross_entropy",
      .shape = str("N", rows, " V", vocabulary),
      .inputs = {normal({rows, vocabulary})},
      .call = {.run = [=](const Tensors& in, Tensors*) {
        return Tensors{ops::cross_entropy(in[0], some_targets(rows, vocabulary, in[0].device()))};
      }}};
}

Case linear_cross_entropy_case(int64_t rows, int64_t dim, int64_t vocabulary) {
  return {.op = "linear_cross_entropy",
          .shape = str("N", rows, " D", dim, " V", vocabulary),
          .inputs = {normal({rows, dim}), normal({vocabulary, dim})},
          .call = {.run = [=](const Tensors& in, Tensors*) {
            const Tensor weights =
                at::ones({rows}, in[0].options().dtype(ops::accumulation_type(in[0])));
            return Tensors{ops::linear_cross_entropy(
                in[0], in[1], some_targets(rows, vocabulary, in[0].device()), weights)};
          }}};
}

// ---- as layers of width D call them: heads and groups of 16 channels

template <int64_t window, int64_t heads_per_kv_head = 1>
Case phalanx_layer(int64_t batch, int64_t length, int64_t dim) {
  const int64_t heads = dim / kHeadWidth;
  return phalanx_case(batch, length, heads, heads / heads_per_kv_head, kHeadWidth, window);
}

template <int64_t taps, bool skip, int64_t group_width = kGroupWidth>
Case hyena_fir_layer(int64_t batch, int64_t length, int64_t dim) {
  return hyena_fir_case(batch, length, dim, dim / group_width, taps, skip);
}

template <int64_t group_width>
Case hyena_li_layer(int64_t batch, int64_t length, int64_t dim) {
  return hyena_modal_case(batch, length, dim, dim / group_width, kModes);
}

Case norm_layer(int64_t batch, int64_t length, int64_t dim) {
  return norm_case(batch * length, dim);
}

// F = 2.75 D, as in evo2-7b.
Case swiglu_layer(int64_t batch, int64_t length, int64_t dim) {
  return glu_case(batch * length, dim / 4 * 11, "swiglu");
}

}  // namespace

std::vector<Case> selftest_cases() {
  return {
      swr_case(2, 67, 3, 5, 16),
      swr_case(1, 257, 2, 16, 128),
      swr_case(2, 50, 3, 4, ops::kFullRecurrence),
      phalanx_case(2, 61, 6, 2, 5, 16),
      phalanx_case(1, 131, 4, 4, 16, ops::kFullRecurrence),
      phalanx_case(2, 150, 4, 4, 16, 16),
      phalanx_case(1, 300, 4, 2, 16, 64),
      phalanx_case(2, 150, 16, 4, 16, 16),
      fir_case(2, 37, 6, 6, 3),
      fir_case(1, 301, 24, 3, 128),
      hyena_fir_case(2, 45, 12, 3, 7, true),
      hyena_fir_case(1, 301, 32, 2, 7, false),
      hyena_fir_case(1, 301, 32, 2, 128, true),
      modal_case(2, 53, 6, 6, 3),
      modal_case(1, 257, 24, 3, 16),
      hyena_modal_case(2, 53, 10, 10, 5),
      hyena_modal_case(1, 257, 32, 32, 16),
      norm_case(7, 129),
      glu_case(5, 77, "swiglu"),
      glu_case(5, 77, "gelu"),
      glu_case(5, 77, "bilinear"),
      rope_case(2, 19, 3, 10),
      attention_case(2, 33, 4, 2, 16, 0),
      attention_case(1, 70, 4, 4, 32, 16),
      cross_entropy_case(13, 101),
      linear_cross_entropy_case(37, 24, 101),
  };
}

const std::vector<LayerCase>& layer_cases() {
  static const std::vector<LayerCase> cases = {
      {"phalanx", true, false, phalanx_layer<16>},
      {"phalanx_w64", true, false, phalanx_layer<64>},
      {"phalanx_w128", true, false, phalanx_layer<128>},
      {"phalanx_full", true, false, phalanx_layer<ops::kFullRecurrence>},
      {"phalanx_kv", true, false, phalanx_layer<16, 4>},
      {"hyena_se", true, false, hyena_fir_layer<7, false>},
      {"hyena_se_4", true, false, hyena_fir_layer<4, false>},
      {"hyena_se_14", true, false, hyena_fir_layer<14, false>},
      {"hyena_mr", true, false, hyena_fir_layer<128, true>},
      {"hyena_mr_8", true, true, hyena_fir_layer<8, true>},
      {"hyena_mr_16", true, true, hyena_fir_layer<16, true>},
      {"hyena_mr_32", true, true, hyena_fir_layer<32, true>},
      {"hyena_mr_64", true, true, hyena_fir_layer<64, true>},
      {"hyena_mr_256", true, true, hyena_fir_layer<256, true>},
      {"hyena_mr_512", true, true, hyena_fir_layer<512, true>},
      {"hyena_mr_1024", true, true, hyena_fir_layer<1024, true>},
      {"hyena_mr_g1", true, true, hyena_fir_layer<128, true, 1>},
      {"hyena_mr_g2", true, true, hyena_fir_layer<128, true, 2>},
      {"hyena_mr_g4", true, true, hyena_fir_layer<128, true, 4>},
      {"hyena_mr_g8", true, true, hyena_fir_layer<128, true, 8>},
      {"hyena_mr_g64", true, true, hyena_fir_layer<128, true, 64>},
      {"hyena_li", true, false, hyena_li_layer<1>},
      {"hyena_li_g16", true, true, hyena_li_layer<16>},
      {"rms_norm", false, false, norm_layer},
      {"swiglu", false, false, swiglu_layer},
  };
  return cases;
}

at::Tensor Selection::of(const at::Tensor& tensor) const {
  if (everything()) return tensor;
  return tensor.index_select(dim, at::tensor(indices, at::kLong).to(tensor.device()));
}

at::Tensor draw(const Input& input, at::ScalarType dtype, const at::Generator& generator) {
  const at::ScalarType kept = input.fp32 && dtype == at::kBFloat16 ? at::kFloat : dtype;
  const auto options = at::TensorOptions().dtype(kept).device(generator.device());
  Tensor values = input.range ? at::rand(input.shape, generator, options)
                                    .mul_(input.range->second - input.range->first)
                                    .add_(input.range->first)
                              : at::randn(input.shape, generator, options);
  return dtype == at::kDouble ? values.to(at::kBFloat16).to(at::kDouble) : values;
}

}  // namespace sarissa::cli
