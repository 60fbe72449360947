// One pass over the rows of each parameter: every number of the rows' weights, moments and gradients is read once and
// written once, and nothing in between is stored.
//
// The equations are those of rwfx/optim/adam.py and sgd.py, in the same letters. Each w, moment and gradient of a
// parameter has one dtype; w and its moments are contiguous. A gradient is a row gradient, or dense: every row's.

#include "rows.h"

#include <torch/library.h>

#include <cmath>
#include <vector>

namespace rwfx {
namespace {

using at::Tensor;
using at::TensorList;

// What numbers of a dtype are computed in.
template <typename scalar_t>
using real_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// The rows of a gradient, none twice, and their values (K, ...). `rows` is not defined where it is every row.
struct RowGradient {
  Tensor rows, values;

  explicit RowGradient(const Tensor& grad) {
    if (grad.layout() == at::kStrided) {
      values = grad.contiguous();
      return;
    }
    // Autograd hands a coalesced gradient on without saying so, and to coalesce it again would copy it.
    const Tensor coalesced = grad.is_coalesced() || ascending(grad._indices()) ? grad : grad.coalesce();
    rows = coalesced._indices()[0].contiguous();
    values = coalesced._values().contiguous();
  }

  static bool ascending(const Tensor& indices) {
    const int64_t count = indices.size(1), step = indices.stride(1);
    const int64_t* at = indices.const_data_ptr<int64_t>();
    for (int64_t k = 1; k < count; ++k) {
      if (at[k * step] <= at[(k - 1) * step]) {
        return false;
      }
    }
    return true;
  }

  // For each row, update(row) gives what is then called, with (at, from, n), for each of its stretches: n numbers, at
  // `at` of each of `parameters`, at `from` of the values.
  template <typename scalar_t, typename Update>
  void for_rows(const std::vector<scalar_t*>& parameters, const Update& update) const {
    const int64_t count = values.size(0), each = count ? values.numel() / count : 0;
    const int64_t* row_at = rows.defined() ? rows.const_data_ptr<int64_t>() : nullptr;
    at::parallel_for(0, count, grain(each), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t row = row_at ? row_at[k] : k;
        const auto update_row = update(row);
        // A row is too short for the processor to see by itself that it is read from end to end. So the next one is
        // fetched, in stretches so short that there is always something to compute meanwhile.
        const bool fetches = row_at && k + 1 < end;
        for (int64_t i = 0; i < each; i += STRETCH) {
          const int64_t n = std::min(STRETCH, each - i);
          if (fetches) {
            for (const scalar_t* of : parameters) {
              prefetch(of + row_at[k + 1] * each + i, n);
            }
          }
          update_row(row * each + i, k * each + i, n);
        }
      }
    });
  }

  static constexpr int64_t STRETCH = 64;

  template <typename scalar_t>
  static void prefetch(const scalar_t* from, int64_t n) {
    constexpr int64_t LINE = 64 / sizeof(scalar_t);
    for (int64_t i = 0; i < n; i += LINE) {
      __builtin_prefetch(from + i);
    }
  }
};

// An update of a row: its number t, and the steps since the row's last one, 1 where none was missed.
struct Update {
  double t, age;

  bool first() const {
    return t == age;
  }
};

// How many updates a row has had: each its own number, or one number for the whole parameter. Where rows owe for the
// steps they have missed, the number is that of the parameter's step (`now`, else 0) at the row's last update.
class Steps {
 public:
  Steps() = default;
  Steps(const Tensor& steps, int64_t now) : of_row_(steps.mutable_data_ptr<float>()), now_(static_cast<double>(now)) {
    if (steps.dim() == 0) {
      of_all_ = *of_row_ += 1;
      of_row_ = nullptr;
    }
  }

  // The update that is made now, which counts it.
  Update next(int64_t row) const {
    if (of_row_ == nullptr) {
      return {of_all_, 1};
    }
    if (now_ == 0) {
      return {of_row_[row] += 1, 1};
    }
    const double age = now_ - of_row_[row];
    of_row_[row] = static_cast<float>(now_);
    return {now_, age};
  }

 private:
  float* of_row_ = nullptr;
  float of_all_ = 0;
  double now_ = 0;
};

struct Adam {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled_weight_decay, maximize;
  double grad_scale;
  double log1 = std::log(beta1), log2 = std::log(beta2);  // taken once, not once a row

  // The update of a row's numbers: n of w, m, v, largest and g. `largest` is null without amsgrad.
  template <typename scalar_t>
  auto row(Update of) const {
    using real = real_t<scalar_t>;
    // expm1: for a beta close to one the difference 1 - beta**t loses four digits.
    const double correction1 = -std::expm1(of.t * log1);
    const double correction2 = std::sqrt(-std::expm1(of.t * log2));
    // What is left of m, v and w of what they were at the row's last update.
    double left1 = beta1, left2 = beta2, left_w = decoupled_weight_decay ? 1 - lr * weight_decay : 1;
    if (of.age != 1) {
      left1 = std::exp(of.age * log1);
      left2 = std::exp(of.age * log2);
      left_w = std::pow(left_w, of.age);
    }
    const auto lr_hat = static_cast<real>(lr * correction2 / correction1);
    const auto eps_hat = static_cast<real>(eps * correction2);
    const auto sign = static_cast<real>((maximize ? -1 : 1) / grad_scale);
    const auto keep1 = static_cast<real>(left1), take1 = static_cast<real>(1 - beta1);
    const auto keep2 = static_cast<real>(left2), take2 = static_cast<real>(1 - beta2);
    const auto coupled = static_cast<real>(decoupled_weight_decay ? 0 : weight_decay);
    const auto keep_w = static_cast<real>(left_w);
    return [=](scalar_t* w, scalar_t* m, scalar_t* v, scalar_t* largest, const scalar_t* g, int64_t n) {
      // Two loops, so that neither has a branch and both become vector instructions.
      if (largest == nullptr) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const real w_i = w[i], g_i = sign * static_cast<real>(g[i]) + coupled * w_i;
          const real m_i = keep1 * static_cast<real>(m[i]) + take1 * g_i;
          const real v_i = keep2 * static_cast<real>(v[i]) + take2 * g_i * g_i;
          m[i] = m_i;
          v[i] = v_i;
          w[i] = keep_w * w_i - lr_hat * m_i / (std::sqrt(v_i) + eps_hat);
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const real w_i = w[i], g_i = sign * static_cast<real>(g[i]) + coupled * w_i;
          const real m_i = keep1 * static_cast<real>(m[i]) + take1 * g_i;
          const real v_i = keep2 * static_cast<real>(v[i]) + take2 * g_i * g_i;
          const real max_i = std::max(static_cast<real>(largest[i]), v_i);
          m[i] = m_i;
          v[i] = v_i;
          largest[i] = max_i;
          w[i] = keep_w * w_i - lr_hat * m_i / (std::sqrt(max_i) + eps_hat);
        }
      }
    };
  }
};

// What a caller must have seen to: here a mistake would write past the end.
void check(const Tensor& w, const TensorList& state, const Tensor* step) {
  for (const Tensor& of : state) {
    TORCH_CHECK(of.sizes() == w.sizes() && of.is_contiguous(), "a state of shape ", of.sizes(), " for ", w.sizes(), ".");
  }
  const bool counts = !step || step->dim() == 0 || (step->dim() == 1 && step->size(0) == w.size(0));
  TORCH_CHECK(w.is_contiguous() && counts, "a parameter that is not contiguous, or steps of another.");
}

void adam_rows_(
    TensorList ws,
    TensorList exp_avgs,
    TensorList exp_avg_sqs,
    TensorList max_exp_avg_sqs,
    TensorList steps,
    at::IntArrayRef now,
    TensorList grads,
    double lr,
    double beta1,
    double beta2,
    double eps,
    double weight_decay,
    bool decoupled_weight_decay,
    bool maximize,
    double grad_scale) {
  for (size_t p = 0; p < ws.size(); ++p) {
    check(ws[p], {exp_avgs[p], exp_avg_sqs[p], max_exp_avg_sqs.empty() ? exp_avgs[p] : max_exp_avg_sqs[p]}, &steps[p]);
  }
  const Adam adam{lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, maximize, grad_scale};
  for (size_t p = 0; p < ws.size(); ++p) {
    const RowGradient grad(grads[p]);
    const Steps count(steps[p], now[p]);
    RWFX_DISPATCH(ws[p].scalar_type(), "rwfx::adam_rows_", [&] {
      auto* w = ws[p].mutable_data_ptr<scalar_t>();
      auto* m = exp_avgs[p].mutable_data_ptr<scalar_t>();
      auto* v = exp_avg_sqs[p].mutable_data_ptr<scalar_t>();
      auto* largest = max_exp_avg_sqs.empty() ? nullptr : max_exp_avg_sqs[p].mutable_data_ptr<scalar_t>();
      const auto* g = grad.values.const_data_ptr<scalar_t>();
      std::vector<scalar_t*> read = {w, m, v};
      if (largest) {
        read.push_back(largest);
      }
      grad.for_rows(read, [&](int64_t row) {
        return [=, update = adam.row<scalar_t>(count.next(row))](int64_t at, int64_t from, int64_t n) {
          update(w + at, m + at, v + at, largest ? largest + at : nullptr, g + from, n);
        };
      });
    });
  }
}

struct SGD {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
  double grad_scale;

  // The update of a row's numbers: n of w, b and g. `b` is null without momentum.
  template <typename scalar_t>
  auto row(Update of) const {
    using real = real_t<scalar_t>;
    const auto sign = static_cast<real>((maximize ? -1 : 1) / grad_scale);
    const auto decay = static_cast<real>(weight_decay), rate = static_cast<real>(lr);
    // b is zero the first time, so that g undampened is all of b.
    const auto take = static_cast<real>(of.first() ? 1 : 1 - dampening), mu = static_cast<real>(momentum);
    const auto keep = static_cast<real>(of.age == 1 ? momentum : std::pow(momentum, of.age));
    const real of_g = nesterov ? 1 : 0, of_b = nesterov ? mu : 1;
    return [=](scalar_t* w, scalar_t* b, const scalar_t* g, int64_t n) {
      if (b == nullptr) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const real w_i = w[i];
          w[i] = w_i - rate * (sign * static_cast<real>(g[i]) + decay * w_i);
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const real w_i = w[i], g_i = sign * static_cast<real>(g[i]) + decay * w_i;
          const real b_i = keep * static_cast<real>(b[i]) + take * g_i;
          b[i] = b_i;
          w[i] = w_i - rate * (of_g * g_i + of_b * b_i);
        }
      }
    };
  }
};

void sgd_rows_(
    TensorList ws,
    TensorList momentum_buffers,
    TensorList steps,
    at::IntArrayRef now,
    TensorList grads,
    double lr,
    double momentum,
    double dampening,
    double weight_decay,
    bool nesterov,
    bool maximize,
    double grad_scale) {
  const SGD sgd{lr, momentum, dampening, weight_decay, nesterov, maximize, grad_scale};
  const bool plain = momentum_buffers.empty();
  for (size_t p = 0; p < ws.size(); ++p) {
    check(ws[p], {plain ? ws[p] : momentum_buffers[p]}, plain ? nullptr : &steps[p]);
  }
  for (size_t p = 0; p < ws.size(); ++p) {
    const RowGradient grad(grads[p]);
    const Steps count = plain ? Steps() : Steps(steps[p], now[p]);
    RWFX_DISPATCH(ws[p].scalar_type(), "rwfx::sgd_rows_", [&] {
      auto* w = ws[p].mutable_data_ptr<scalar_t>();
      auto* b = plain ? nullptr : momentum_buffers[p].mutable_data_ptr<scalar_t>();
      const auto* g = grad.values.const_data_ptr<scalar_t>();
      std::vector<scalar_t*> read = {w};
      if (b) {
        read.push_back(b);
      }
      grad.for_rows(read, [&](int64_t row) {
        return [=, update = sgd.row<scalar_t>(count.next(row))](int64_t at, int64_t from, int64_t n) {
          update(w + at, b ? b + at : nullptr, g + from, n);
        };
      });
    });
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rwfx, m) {
  m.def(
      "adam_rows_(Tensor(a!)[] w, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] max_exp_avg_sq, "
      "Tensor(e!)[] step, int[] now, Tensor[] grad, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, bool decoupled_weight_decay, bool maximize, float grad_scale) -> ()");
  m.def(
      "sgd_rows_(Tensor(a!)[] w, Tensor(b!)[] momentum_buffer, Tensor(c!)[] step, int[] now, Tensor[] grad, "
      "float lr, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, "
      "float grad_scale) -> ()");
}

// Once for dense gradients alone, once for where a gradient is sparse.
TORCH_LIBRARY_IMPL(rwfx, CPU, m) {
  m.impl("adam_rows_", adam_rows_);
  m.impl("sgd_rows_", sgd_rows_);
}

TORCH_LIBRARY_IMPL(rwfx, SparseCPU, m) {
  m.impl("adam_rows_", adam_rows_);
  m.impl("sgd_rows_", sgd_rows_);
}

}  // namespace rwfx
