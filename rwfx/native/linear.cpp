// rwfx::row_linear on the CPU: its autograd, and its backward as one operator, rwfx::row_linear_backward.
//
// The equations are those of rwfx/ops/linear.py, in the same letters. The products are PyTorch's own; around them, the
// rows and columns are gathered and scattered in one pass each, and a set of all rows is not gathered at all.

#include "rows.h"

#include <ATen/ops/_sparse_coo_tensor_unsafe.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace rwfx {
namespace {

using at::Tensor;
using std::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Above this share of columns, to gather and scatter them costs more than the rest of the product.
constexpr double MOST_COLUMNS = 0.7;

// x[:, columns] of a (B, O) with any strides: (B, K), stored by columns where `by_columns` says so or x is.
Tensor gather_columns(const Tensor& x, const Tensor& columns, bool by_columns = false) {
  const int64_t count = columns.numel(), batch = x.size(0), down = x.stride(0), across = x.stride(1);
  const int64_t* at = columns.const_data_ptr<int64_t>();
  by_columns = by_columns || (down == 1 && across != 1);
  Tensor out = by_columns ? at::empty({count, batch}, x.options()).t() : at::empty({batch, count}, x.options());
  RWFX_DISPATCH(x.scalar_type(), "rwfx::gather_columns", [&] {
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    if (down == 1) {
      at::parallel_for(0, count, grain(batch), [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
          for (int64_t b = 0; b < batch; ++b) {
            to[by_columns ? k * batch + b : b * count + k] = from[at[k] * across + b];
          }
        }
      });
      return;
    }
    at::parallel_for(0, batch, grain(count), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t k = 0; k < count; ++k) {
          to[by_columns ? k * batch + b : b * count + k] = from[b * down + at[k] * across];
        }
      }
    });
  });
  return out;
}

// w[rows], and of these the columns given: (K, I) or (K, C).
Tensor gather_rows(const Tensor& w, const Tensor& rows, const optional<Tensor>& columns) {
  const int64_t count = rows.numel(), width = w.size(1), down = w.stride(0), across = w.stride(1);
  const int64_t* row_at = rows.const_data_ptr<int64_t>();
  const int64_t* at = columns ? columns->const_data_ptr<int64_t>() : nullptr;
  const int64_t taken = columns ? columns->numel() : width;
  Tensor out = at::empty({count, taken}, w.options());
  RWFX_DISPATCH(w.scalar_type(), "rwfx::gather_rows", [&] {
    const scalar_t* from = w.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, count, grain(taken), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const scalar_t* row = from + row_at[k] * down;
        if (at == nullptr && across == 1) {
          std::memcpy(to + k * taken, row, taken * sizeof(scalar_t));
          continue;
        }
        for (int64_t c = 0; c < taken; ++c) {
          to[k * taken + c] = row[(at ? at[c] : c) * across];
        }
      }
    });
  });
  return out;
}

// A (B, I) that is x (B, C) in the columns given and zero elsewhere.
Tensor scatter_columns(const Tensor& x, const Tensor& columns, int64_t width) {
  const int64_t count = columns.numel(), batch = x.size(0);
  const int64_t* at = columns.const_data_ptr<int64_t>();
  Tensor out = at::empty({batch, width}, x.options());
  RWFX_DISPATCH(x.scalar_type(), "rwfx::scatter_columns", [&] {
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, batch, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        std::memset(to + b * width, 0, width * sizeof(scalar_t));
        for (int64_t c = 0; c < count; ++c) {
          to[b * width + at[c]] = from[b * count + c];
        }
      }
    });
  });
  return out;
}

// As scatter_columns, of an x that is stored by columns; so is the result. The other columns are not even written, for
// nothing reads them, but where somebody looks for numbers that are not finite.
Tensor scatter_by_columns(const Tensor& x, const Tensor& columns, int64_t width) {
  const int64_t count = columns.numel(), batch = x.size(0), bytes = batch * x.element_size();
  const int64_t* at = columns.const_data_ptr<int64_t>();
  const bool looked_at = torch::autograd::AnomalyMode::is_enabled();
  Tensor out = (looked_at ? at::zeros({width, batch}, x.options()) : at::empty({width, batch}, x.options())).t();
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t c = 0; c < count; ++c) {
    std::memcpy(to + at[c] * bytes, from + c * bytes, bytes);
  }
  return out;
}

// A (O, ...) that is `values` (K, ...) in the rows given and zero elsewhere.
Tensor scatter_rows(const Tensor& values, const Tensor& rows, int64_t num_rows) {
  auto sizes = values.sizes().vec();
  sizes[0] = num_rows;
  Tensor out = at::zeros(sizes, values.options());
  const int64_t each = values.numel() / std::max<int64_t>(1, rows.numel()) * values.element_size();
  const int64_t* at = rows.const_data_ptr<int64_t>();
  const char* from = static_cast<const char*>(values.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  at::parallel_for(0, rows.numel(), grain(each / 4), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      std::memcpy(to + at[k] * each, from + k * each, each);
    }
  });
  return out;
}

// A row gradient: see rwfx/ops/row_gradient.py. `values` is taken over; `rows` is copied.
Tensor pack(const Tensor& values, const Tensor& rows, int64_t num_rows) {
  auto sizes = values.sizes().vec();
  sizes[0] = num_rows;
  return at::_sparse_coo_tensor_unsafe(rows.clone().unsqueeze(0), values, sizes, values.options(), true);
}

// What may be computed of the input first: its forward, and its backward from the output's gradient and from either the
// input or the output.
struct Activation {
  std::string_view name;
  bool of_input;
  Tensor (*forward)(const Tensor& x);
  Tensor (*backward)(const Tensor& g, const Tensor& of);
};

const Activation ACTIVATIONS[] = {
    {"relu", false, [](const Tensor& x) { return at::relu(x); },
     [](const Tensor& g, const Tensor& a) { return at::threshold_backward(g, a, 0); }},
    {"gelu", true, [](const Tensor& x) { return at::gelu(x); },
     [](const Tensor& g, const Tensor& x) { return at::gelu_backward(g, x); }},
    {"silu", true, [](const Tensor& x) { return at::silu(x); },
     [](const Tensor& g, const Tensor& x) { return at::silu_backward(g, x); }},
    {"tanh", false, [](const Tensor& x) { return at::tanh(x); },
     [](const Tensor& g, const Tensor& a) { return at::tanh_backward(g, a); }},
    {"sigmoid", false, [](const Tensor& x) { return at::sigmoid(x); },
     [](const Tensor& g, const Tensor& a) { return at::sigmoid_backward(g, a); }},
};

const Activation* activation_of(std::string_view name) {
  for (const Activation& activation : ACTIVATIONS) {
    if (activation.name == name) {
      return &activation;
    }
  }
  TORCH_CHECK_VALUE(name.empty(), "activation must be relu, gelu, silu, tanh, sigmoid or empty, got ", name, ".");
  return nullptr;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Gradients backward(
    const Tensor& g,
    const optional<Tensor>& a,
    const optional<Tensor>& activated,
    const optional<Tensor>& weight,
    const Tensor& given_rows,
    const optional<Tensor>& given_columns,
    bool needs_bias,
    at::ScalarType x_dtype,
    at::ScalarType dtype,
    bool full_dx,
    std::string_view grad,
    std::string_view activation,
    bool direct) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Tensor rows = given_rows.contiguous();
  const int64_t num_rows = g.size(-1);
  const bool all_rows = rows.numel() == num_rows;
  const Tensor g_BO = g.reshape({-1, num_rows});
  const Tensor g_BK = all_rows ? g_BO : gather_columns(g_BO, rows);
  const auto of_parameter = [&](Tensor values) {
    values = values.to(dtype);
    return grad == "kept" ? values : grad == "rows" ? pack(values, rows, num_rows) : scatter_rows(values, rows, num_rows);
  };
  Tensor dx, dw, db;
  if (a) {
    dw = of_parameter(at::mm(g_BK.t(), a->reshape({-1, a->size(-1)}).to(g.scalar_type())));
  }
  if (needs_bias) {
    db = of_parameter(g_BK.sum(0));
  }
  if (weight) {
    const int64_t width = weight->size(1);
    const Activation* of = activation_of(activation);
    const auto through = [&](Tensor da, const auto& columns_of) {
      da = da.to(x_dtype);
      return of ? of->backward(da, columns_of(activated->reshape({-1, width}))) : da;
    };
    if (given_columns && !full_dx && (direct || given_columns->numel() < MOST_COLUMNS * width)) {
      const Tensor columns = given_columns->contiguous();
      const Tensor w_KC = gather_rows(*weight, rows, columns).to(g.scalar_type());
      const auto gather = [&](const Tensor& x) { return gather_columns(x, columns, direct); };
      if (direct) {
        const Tensor dx_CB = through(at::mm(w_KC.t(), g_BK.t()).t(), gather);
        dx = scatter_by_columns(dx_CB, columns, width);
      } else {
        dx = scatter_columns(through(at::mm(g_BK, w_KC), gather), columns, width);
      }
    } else {
      const Tensor w = full_dx || all_rows ? *weight : gather_rows(*weight, rows, {});
      dx = through(at::mm(full_dx ? g_BO : g_BK, w.to(g.scalar_type())), [](const Tensor& x) { return x; });
    }
    auto shape = g.sizes().vec();
    shape.back() = width;
    dx = dx.view(shape);
  }
  return {dx, dw, db};
}

void check_rows(const Tensor& rows) {
  TORCH_CHECK_VALUE(
      rows.scalar_type() == at::kLong && rows.dim() == 1,
      "rows must be a one-dimensional int64 tensor of row numbers, got ", rows.scalar_type(), " of shape ", rows.sizes(), ".");
}

class RowLinear : public torch::autograd::Function<RowLinear> {
 public:
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& x,
      const Tensor& weight,
      const optional<Tensor>& bias,
      const optional<Tensor>& kept_weight,
      const optional<Tensor>& kept_bias,
      const Tensor& rows,
      const optional<Tensor>& columns,
      std::string_view dx,
      std::string_view grad,
      optional<at::ScalarType> dtype,
      std::string_view activation,
      bool direct) {
    check_rows(rows);
    const Activation* of = activation_of(activation);
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor a = of ? of->forward(x) : x;
    const bool trained = (kept_weight ? *kept_weight : weight).requires_grad(), needs_x = x.requires_grad();
    // Only what the backward pass reads.
    ctx->save_for_backward({
        trained ? a : Tensor(),
        needs_x && of ? (of->of_input ? x : a) : Tensor(),
        needs_x ? weight : Tensor(),
        rows,
        columns.value_or(Tensor()),
    });
    ctx->saved_data["edges"] = std::vector<bool>{
        bias.has_value() && bias->defined(), kept_weight.has_value(), kept_bias.has_value()};
    ctx->saved_data["full_dx"] = dx == "full";
    ctx->saved_data["direct"] = direct;
    ctx->saved_data["grad"] = std::string(kept_weight ? "kept" : grad);
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["dtypes"] = std::vector<int64_t>{
        static_cast<int64_t>(x.scalar_type()), static_cast<int64_t>(weight.scalar_type())};
    if (!dtype) {
      return at::linear(a, weight, bias);
    }
    return at::linear(a.to(*dtype), weight.to(*dtype), bias ? optional<Tensor>(bias->to(*dtype)) : bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "rwfx::row_linear has no second derivative: leave create_graph=True out.");
    const auto saved = ctx->get_saved_variables();
    const auto has = ctx->saved_data["edges"].toBoolList();
    const std::string grad = ctx->saved_data["grad"].toStringRef();
    const auto dtypes = ctx->saved_data["dtypes"].toIntVector();
    // An edge for every tensor of the arguments that is there, in their order.
    size_t edge = 0;
    const bool needs_x = ctx->needs_input_grad(edge++);
    const bool of_weight = ctx->needs_input_grad(edge++);
    const bool of_bias = has[0] && ctx->needs_input_grad(edge++);
    const bool of_kept_weight = has[1] && ctx->needs_input_grad(edge++);
    const bool of_kept_bias = has[2] && ctx->needs_input_grad(edge++);
    const bool kept = grad == "kept";
    const auto given = [&](size_t k, bool wanted) {
      return wanted && saved[k].defined() ? optional<Tensor>(saved[k]) : optional<Tensor>();
    };
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rwfx::row_linear_backward", "")
                               .typed<decltype(rwfx::backward)>();
    const auto [dx, dw, db] = op.call(
        gradients[0],
        given(0, kept ? of_kept_weight : of_weight),
        given(1, needs_x),
        given(2, needs_x),
        saved[3],
        given(4, true),
        kept ? of_kept_bias : of_bias,
        static_cast<at::ScalarType>(dtypes[0]),
        static_cast<at::ScalarType>(dtypes[1]),
        ctx->saved_data["full_dx"].toBool(),
        grad,
        ctx->saved_data["activation"].toStringRef(),
        ctx->saved_data["direct"].toBool());
    variable_list all(12);
    all[0] = dx;
    all[kept ? 3 : 1] = dw;
    all[kept ? 4 : 2] = db;
    return all;
  }
};

Tensor row_linear(
    const Tensor& x,
    const Tensor& weight,
    const optional<Tensor>& bias,
    const Tensor& rows,
    std::string_view dx,
    std::string_view grad,
    optional<at::ScalarType> dtype,
    const optional<Tensor>& kept_weight,
    const optional<Tensor>& kept_bias,
    const optional<Tensor>& columns,
    std::string_view activation,
    bool direct) {
  return RowLinear::apply(x, weight, bias, kept_weight, kept_bias, rows, columns, dx, grad, dtype, activation, direct);
}

}  // namespace

TORCH_LIBRARY_IMPL(rwfx, CPU, m) {
  m.impl("row_linear_backward", backward);
}

TORCH_LIBRARY_IMPL(rwfx, AutogradCPU, m) {
  m.impl("row_linear", row_linear);
  m.impl("row_linear_backward", torch::CppFunction::makeFallthrough());
}

}  // namespace rwfx
