// rwfx::pick_examples on the CPU, and the operators that it and the example sampler call: those of rwfx/ops/examples.py,
// in the same letters.

#include "draw.h"
#include "random.h"
#include "rows.h"

#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace rwfx {
namespace {

using at::Tensor;
using std::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr uint64_t ORDER = 1 << 20;  // a stream that no walk uses

// A sum of squares of half precision overflows in it.
optional<at::ScalarType> wide(const Tensor& g) {
  const bool narrow = g.scalar_type() == at::kHalf || g.scalar_type() == at::kBFloat16;
  return narrow ? optional<at::ScalarType>(at::kFloat) : std::nullopt;
}

Tensor sizes_of(const std::vector<Tensor>& gradients) {
  std::vector<Tensor> norms;
  for (const Tensor& g : gradients) {
    const Tensor g_BI = g.dim() > 1 ? g.flatten(1) : g.unsqueeze(1);
    norms.push_back(at::linalg_vector_norm(g_BI, 2, {1}, false, wide(g)).to(at::kFloat));
  }
  return norms.size() == 1 ? norms[0] : at::linalg_vector_norm(at::stack(norms), 2, {0});
}

// "(3, 4), ()".
std::string shapes_of(at::TensorList tensors) {
  std::ostringstream out;
  for (size_t k = 0; k < tensors.size(); ++k) {
    out << (k ? ", (" : "(");
    for (int64_t d = 0; d < tensors[k].dim(); ++d) {
      out << (d ? ", " : "") << tensors[k].sym_size(d);
    }
    out << (tensors[k].dim() == 1 ? ",)" : ")");
  }
  return out.str();
}

class Pick : public torch::autograd::Function<Pick> {
 public:
  static variable_list forward(
      AutogradContext* ctx,
      const at::TensorList& outputs,
      const Tensor& kept,
      const c10::SymInt& num_examples,
      const optional<Tensor>& state,
      double floor,
      bool unbiased,
      const optional<Tensor>& needed,
      double share,
      double memory,
      bool whole,
      at::IntArrayRef without) {
    std::vector<bool> has;
    bool any = false;
    for (const Tensor& output : outputs) {
      const bool named = std::find(without.begin(), without.end(), static_cast<int64_t>(has.size())) != without.end();
      has.push_back(!named && output.dim() > 0 && output.sym_size(0) == num_examples);
      any |= has.back();
    }
    TORCH_CHECK_VALUE(
        any, "examples= needs an output with an entry for each of the ", num_examples,
        " examples, first dimension; the outputs have the shapes ", shapes_of(outputs), ".");
    // Not saved: it is written in the backward pass, and so are what others hold of it.
    ctx->saved_data["kept"] = kept;
    if (state) {
      ctx->saved_data["state"] = *state;
    }
    if (needed) {
      ctx->saved_data["needed"] = *needed;
    }
    ctx->saved_data["has"] = has;
    ctx->saved_data["numbers"] = std::vector<double>{floor, share, memory};
    ctx->saved_data["flags"] = std::vector<bool>{unbiased, whole};
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list copies, fixed;
    for (const Tensor& output : outputs) {
      copies.push_back(output.clone());
      if (!output.requires_grad()) {
        fixed.push_back(copies.back());
      }
    }
    ctx->mark_non_differentiable(fixed);
    return copies;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    TORCH_CHECK(
        !at::GradMode::is_enabled(), "rwfx::pick_examples has no second derivative: leave create_graph=True out.");
    auto& saved = ctx->saved_data;
    const auto has = saved["has"].toBoolList();
    const auto numbers = saved["numbers"].toDoubleVector();
    const auto flags = saved["flags"].toBoolList();
    const bool unbiased = flags[0], whole = flags[1];
    Tensor kept = saved["kept"].toTensor();
    std::vector<Tensor> looked_at;
    for (size_t k = 0; k < gradients.size(); ++k) {
      if (has[k] && gradients[k].defined()) {
        looked_at.push_back(gradients[k]);
      }
    }
    TORCH_CHECK(
        !looked_at.empty(),
        "examples= decides by the gradient at the outputs that have an entry for each example, and the loss has none "
        "there.");
    const Tensor size_B = sizes_of(looked_at);
    if (const auto needed = saved.find("needed"); needed != saved.end()) {
      static const auto note = find_op<void(Tensor&, const Tensor&, double, double)>("rwfx::note_needed_");
      Tensor written = needed->second.toTensor();
      note.call(written, size_B, numbers[1], numbers[2]);
    }
    Tensor chosen, scale_E;
    if (const auto state = saved.find("state"); state == saved.end()) {
      static const auto top = find_op<Tensor(const Tensor&, c10::SymInt)>("rwfx::top_rows");
      chosen = top.call(size_B, kept.sym_size(0));
    } else {
      static const auto draw =
          find_op<std::tuple<Tensor, Tensor>(const Tensor&, c10::SymInt, const Tensor&, double)>("rwfx::draw_by_size");
      Tensor chance_E;
      std::tie(chosen, chance_E) = draw.call(size_B, kept.sym_size(0), state->second.toTensor(), numbers[0]);
      scale_E = unbiased ? chance_E.reciprocal() : Tensor();
    }
    kept.copy_(chosen);
    variable_list all;
    for (size_t k = 0; k < gradients.size(); ++k) {
      const Tensor& g = gradients[k];
      if (!g.defined() || !has[k] || (whole && !scale_E.defined())) {
        all.push_back(g);
        continue;
      }
      Tensor g_E = g.index_select(0, chosen);
      if (scale_E.defined()) {
        std::vector<c10::SymInt> sizes(g.dim(), 1);
        sizes[0] = scale_E.sym_size(0);
        g_E = at::mul(g_E, scale_E.to(g.scalar_type()).view_symint(sizes));
      }
      all.push_back(at::zeros_like(g).index_copy(0, chosen, g_E));
    }
    all.resize(all.size() + 10);
    return all;
  }
};

std::vector<Tensor> pick_examples(
    const at::TensorList outputs,
    const Tensor& kept,
    c10::SymInt num_examples,
    const optional<Tensor>& state,
    double floor,
    bool unbiased,
    const optional<Tensor>& needed,
    double share,
    double memory,
    bool whole,
    at::IntArrayRef without) {
  return Pick::apply(outputs, kept, num_examples, state, floor, unbiased, needed, share, memory, whole, without);
}

// (1 - floor) * size / sum + floor / batch in place. One that is not finite comes first, so that a gradient that is nan
// reaches the weights.
void weigh(double* size, int64_t batch, double floor) {
  constexpr double FIRST = 1e9;
  const double uniform = 1.0 / static_cast<double>(batch);
  double total = 0;
  for (int64_t b = 0; b < batch; ++b) {
    total += std::isfinite(size[b]) ? size[b] : 0;
  }
  for (int64_t b = 0; b < batch; ++b) {
    const double mixed = (1 - floor) * (total > 0 ? size[b] / total : uniform) + floor * uniform;
    size[b] = std::isfinite(size[b]) ? mixed : FIRST;
  }
}

std::tuple<Tensor, Tensor> draw_by_size(const Tensor& given, int64_t count, const Tensor& state, double floor) {
  const Tensor size = given.to(at::kDouble).clone();
  const int64_t batch = size.numel();
  double* s = size.mutable_data_ptr<double>();
  weigh(s, batch, floor);
  to_chances(s, batch, count);
  const int64_t* numbers = state.const_data_ptr<int64_t>();
  const Uniform uniform = Uniform::of_step(numbers[0], numbers[1]);
  const std::vector<int64_t> order = random_order(uniform, ORDER, batch);
  Tensor drawn = at::empty({count}, state.options()), chance = at::empty({count}, given.options().dtype(at::kFloat));
  int64_t* to = drawn.mutable_data_ptr<int64_t>();
  systematic(s, order.data(), batch, uniform(ORDER + 1, 0), count, to);
  std::transform(to, to + count, chance.mutable_data_ptr<float>(), [&](int64_t b) { return static_cast<float>(s[b]); });
  return {drawn, chance};
}

void note_needed_(Tensor& needed, const Tensor& size, double share, double memory) {
  const Tensor given = size.to(at::kDouble).contiguous();
  std::vector<double> squares(given.const_data_ptr<double>(), given.const_data_ptr<double>() + given.numel());
  for (double& square : squares) {
    square *= square;
  }
  std::sort(squares.begin(), squares.end(), std::greater<>());
  std::partial_sum(squares.begin(), squares.end(), squares.begin());
  float* to = needed.mutable_data_ptr<float>();
  const double total = squares.empty() ? 0 : squares.back();
  // Where nothing is left to learn, or nothing can be said, as before.
  if (std::isfinite(total) && total > 0) {
    const auto below = std::lower_bound(squares.begin(), squares.end(), share * total) - squares.begin();
    const double fraction = static_cast<double>(below + 1) / static_cast<double>(squares.size());
    *to = static_cast<float>(memory * *to + (1 - memory) * fraction);
  }
  torch::autograd::impl::bump_version(needed);
}

std::tuple<Tensor, Tensor> blank_examples(
    const Tensor& needed, int64_t num_examples, int64_t count, at::ArrayRef<double> fractions) {
  if (!fractions.empty()) {
    const float wanted = needed.const_data_ptr<float>()[0];
    const auto enough = std::find_if(fractions.begin(), fractions.end(), [&](double f) { return f >= wanted; });
    const double fraction = enough == fractions.end() ? fractions.back() : *enough;
    count = std::max<int64_t>(1, std::ceil(fraction * static_cast<double>(num_examples) * (1 - 1e-9)));
  }
  const auto options = needed.options().dtype(at::kLong);
  Tensor counts = at::empty({2}, options);
  counts.mutable_data_ptr<int64_t>()[0] = count;
  counts.mutable_data_ptr<int64_t>()[1] = num_examples;
  return {at::full({count}, -1, options), counts};
}

}  // namespace

TORCH_LIBRARY_IMPL(rwfx, CPU, m) {
  m.impl("draw_by_size", draw_by_size);
  m.impl("note_needed_", note_needed_);
  m.impl("blank_examples", blank_examples);
}

TORCH_LIBRARY_IMPL(rwfx, AutogradCPU, m) {
  m.impl("pick_examples", pick_examples);
  for (const char* op : {"draw_by_size", "note_needed_", "blank_examples"}) {
    m.impl(op, torch::CppFunction::makeFallthrough());
  }
}

}  // namespace rwfx
