// rwfx::sparse_linear, rwfx::sparse_conv and their backward passes on the CPU: the equations of
// rwfx/ops/sparse_linear.py and rwfx/ops/sparse_conv.py.
//
// A batch is packed (packing.h), multiplied (sparse_products.h) and unpacked, tile by tile. Sums are of float, or of
// double where the input is.

#include "packing.h"
#include "rows.h"
#include "sparse_products.h"

#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace rwfx {
namespace {

using at::IntArrayRef;
using at::Tensor;
using std::optional;

// Vectors of examples in a tile of a linear layer's batch.
constexpr int64_t MOST_VECTORS = 16;

Places places_of(const Tensor& ccol, const Tensor& row, const Tensor& crow, const Tensor& col, const Tensor& order) {
  const auto data = [](const Tensor& t) { return t.defined() ? t.const_data_ptr<int32_t>() : nullptr; };
  return {data(ccol), data(row), data(crow), data(col), data(order)};
}

void check_operands(
    int64_t features, int64_t columns, int64_t rows, const Tensor& values, const Tensor& row,
    const optional<Tensor>& bias) {
  TORCH_CHECK_VALUE(
      features == columns, "x has ", features, " features and the sparse weight has ", columns, " columns.");
  TORCH_CHECK_VALUE(
      values.dim() == 1 && values.numel() == row.numel(),
      "values has the shape ", values.sizes(), " for ", row.numel(), " places of the index.");
  TORCH_CHECK_VALUE(
      !bias || (bias->dim() == 1 && bias->numel() == rows),
      "bias has the shape ", bias->sizes(), " and the sparse weight has ", rows, " rows.");
}

// The type to compute in; other numbers are converted before and after.
at::ScalarType type_for(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// ---- The plans.

// `gathered` are the features that are read in no order: the columns, or in the backward pass the rows.
template <class T>
Plan linear_plan(int64_t batch, int64_t columns, int64_t rows, int64_t gathered) {
  const int64_t vectors = std::max<int64_t>(1, (batch + LANES<T> - 1) / LANES<T>);
  const int64_t most = std::clamp<int64_t>(MOST_BYTES / (std::max<int64_t>(1, gathered) * VECTOR_BYTES), 1, MOST_VECTORS);
  const int64_t tiles = (vectors + most - 1) / most;
  const int64_t places = (vectors + tiles - 1) / tiles;
  Plan plan{tiles, columns, rows, 1, places, places, 1, true, {}, {}};
  for (int64_t p = 0; p < places; ++p) {
    plan.in_place.push_back(p * LANES<T>);
  }
  plan.in_offset.resize(columns);
  for (int64_t i = 0; i < columns; ++i) {
    plan.in_offset[i] = i * places * LANES<T>;
  }
  return plan;
}

struct Options {
  IntArrayRef kernel, stride, padding, dilation;
  int64_t groups;
};

void check_conv(const Tensor& x, int64_t rows, const Options& o) {
  TORCH_CHECK_VALUE(x.dim() == 4, "x must be (B, C, H, W), got the shape ", x.sizes(), ".");
  TORCH_CHECK_VALUE(
      o.groups > 0 && x.size(1) % o.groups == 0 && rows % o.groups == 0,
      x.size(1), " channels and ", rows, " rows cannot be dealt to groups=", o.groups, ".");
  for (const IntArrayRef sizes : {o.kernel, o.stride, o.padding, o.dilation}) {
    TORCH_CHECK_VALUE(sizes.size() == 2, "kernel, stride, padding and dilation must be two numbers each.");
  }
  for (int dim = 0; dim < 2; ++dim) {
    TORCH_CHECK_VALUE(
        o.kernel[dim] > 0 && o.stride[dim] > 0 && o.dilation[dim] > 0 && o.padding[dim] >= 0,
        "kernel, stride and dilation must be above 0 and padding not below, got ",
        o.kernel, ", ", o.stride, ", ", o.dilation, " and ", o.padding, ".");
    const int64_t size = x.size(2 + dim) + 2 * o.padding[dim], reach = o.dilation[dim] * (o.kernel[dim] - 1) + 1;
    TORCH_CHECK_VALUE(
        size >= reach, "the kernel reaches over ", reach, " places and the padded input has ", size, ".");
  }
}

int64_t out_size(int64_t size, const Options& o, int dim) {
  return (size + 2 * o.padding[dim] - o.dilation[dim] * (o.kernel[dim] - 1) - 1) / o.stride[dim] + 1;
}

template <class T>
Plan conv_plan(const Tensor& x, int64_t rows, const Options& o) {
  const int64_t height = x.size(2) + 2 * o.padding[0], width = x.size(3) + 2 * o.padding[1];
  const int64_t out_height = out_size(x.size(2), o, 0), out_width = out_size(x.size(3), o, 1);
  Plan plan{
      (x.size(0) + LANES<T> - 1) / LANES<T>,
      x.size(1), rows, o.groups, height * width, out_height * out_width, o.kernel[0] * o.kernel[1], false, {}, {}};
  for (int64_t p = 0; p < out_height; ++p) {
    for (int64_t q = 0; q < out_width; ++q) {
      plan.in_place.push_back((p * o.stride[0] * width + q * o.stride[1]) * LANES<T>);
    }
  }
  for (int64_t c = 0; c < x.size(1) / o.groups; ++c) {
    for (int64_t u = 0; u < o.kernel[0]; ++u) {
      for (int64_t v = 0; v < o.kernel[1]; ++v) {
        plan.in_offset.push_back((c * plan.in_places + u * o.dilation[0] * width + v * o.dilation[1]) * LANES<T>);
      }
    }
  }
  return plan;
}

// ---- The batches. What is only read is not written to.

template <class T>
Examples<T> examples(const Tensor& x_BI, const Plan& plan) {
  T* data = const_cast<T*>(x_BI.const_data_ptr<T>());
  return {data, x_BI.size(0), x_BI.stride(0), x_BI.stride(1), plan.in_places};
}

template <class T>
Images<T> images(const Tensor& x, int64_t above = 0, int64_t left = 0) {
  T* data = const_cast<T*>(x.const_data_ptr<T>());
  return {
      data, x.size(0), x.size(2), x.size(3), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}, above, left};
}

template <class T, class In, class Out>
void multiply(
    const Plan& plan, const Places& at, const Tensor& values, const optional<Tensor>& bias, const In& in,
    const Out& out) {
  const auto type = c10::CppTypeToScalarType<T>::value;
  const Tensor v = values.to(type).contiguous(), b = bias ? bias->to(type).contiguous() : Tensor();
  forward<T>(plan, at, v.const_data_ptr<T>(), bias ? b.const_data_ptr<T>() : nullptr, in, out);
}

// Fills dx, where it is needed, and gives dv, empty where it is not.
template <class T, class In, class Grad, class Out>
Tensor multiply_back(
    const Plan& plan, const Places& at, const Tensor& values, const In& in, const Grad& grad, const Out& out,
    bool needs_dx, bool needs_dv) {
  const Tensor v = values.to(c10::CppTypeToScalarType<T>::value).contiguous();
  Tensor dv = fresh({needs_dv ? v.numel() : 0}, v.options()).zero_();
  const auto run = !needs_dx ? backward<T, false, true, In, Grad, Out>
      : needs_dv             ? backward<T, true, true, In, Grad, Out>
                             : backward<T, true, false, In, Grad, Out>;
  run(plan, at, v.const_data_ptr<T>(), in, grad, out, dv.mutable_data_ptr<T>());
  return dv.to(values.scalar_type());
}

// ---- By products with a dense weight that is filled for the call.

Tensor dense_weight(const Tensor& values, const Tensor& ccol, const Tensor& row, int64_t rows, at::ScalarType type) {
  const int64_t columns = ccol.numel() - 1;
  Tensor full = at::zeros({rows, columns}, values.options().dtype(type));
  const Tensor v = values.to(type).contiguous();
  const int32_t *start = ccol.const_data_ptr<int32_t>(), *at = row.const_data_ptr<int32_t>();
  RWFX_DISPATCH(type, "rwfx::dense_weight", [&] {
    const scalar_t* from = v.const_data_ptr<scalar_t>();
    scalar_t* to = full.mutable_data_ptr<scalar_t>();
    for (int64_t j = 0; j < columns; ++j) {
      for (int32_t n = start[j]; n < start[j + 1]; ++n) {
        to[at[n] * columns + j] = from[n];
      }
    }
  });
  return full;
}

Tensor values_of(const Tensor& full, const Tensor& ccol, const Tensor& row, at::ScalarType type) {
  const int64_t columns = ccol.numel() - 1;
  const Tensor whole = full.reshape({-1, columns}).contiguous();
  Tensor values = at::empty({row.numel()}, whole.options());
  const int32_t *start = ccol.const_data_ptr<int32_t>(), *at = row.const_data_ptr<int32_t>();
  RWFX_DISPATCH(whole.scalar_type(), "rwfx::values_of", [&] {
    const scalar_t* from = whole.const_data_ptr<scalar_t>();
    scalar_t* to = values.mutable_data_ptr<scalar_t>();
    for (int64_t j = 0; j < columns; ++j) {
      for (int32_t n = start[j]; n < start[j + 1]; ++n) {
        to[n] = from[at[n] * columns + j];
      }
    }
  });
  return values.to(type);
}

optional<Tensor> as_type(const optional<Tensor>& t, at::ScalarType type) {
  return t ? optional<Tensor>(t->to(type)) : t;
}

// ---- The operators.

Tensor sparse_linear(
    const Tensor& x, const Tensor& values, const optional<Tensor>& bias, const Tensor& ccol, const Tensor& row,
    const Tensor& crow, const Tensor& col, const Tensor& order, std::string_view by) {
  const int64_t rows = crow.numel() - 1, columns = ccol.numel() - 1;
  check_operands(x.size(-1), columns, rows, values, row, bias);
  if (by == "dense") {
    const Tensor full = dense_weight(values, ccol, row, rows, x.scalar_type());
    return at::linear(x, full, as_type(bias, x.scalar_type())).contiguous();
  }
  auto sizes = x.sizes().vec();
  sizes.back() = rows;
  const Tensor x_BI = x.reshape({-1, columns}).to(type_for(x));
  const Tensor y = fresh({x_BI.size(0), rows}, x_BI.options());
  AT_DISPATCH_FLOATING_TYPES(type_for(x), "rwfx::sparse_linear", [&] {
    using T = scalar_t;
    const Plan plan = linear_plan<T>(x_BI.size(0), columns, rows, columns);
    multiply<T>(
        plan, places_of(ccol, row, crow, col, order), values, bias, examples<T>(x_BI, plan), examples<T>(y, plan));
  });
  return y.reshape(sizes).to(x.scalar_type());
}

std::tuple<Tensor, Tensor> sparse_linear_backward(
    const Tensor& g, const Tensor& x, const Tensor& values, const Tensor& ccol, const Tensor& row, const Tensor& crow,
    bool needs_dx, bool needs_dv, std::string_view by) {
  const int64_t rows = crow.numel() - 1, columns = ccol.numel() - 1;
  check_operands(x.size(-1), columns, rows, values, row, {});
  const auto type = by == "dense" ? x.scalar_type() : type_for(x);
  const Tensor x_BI = x.reshape({-1, columns}).to(type), g_BO = g.reshape({-1, rows}).to(type);
  TORCH_CHECK_VALUE(
      g_BO.size(0) == x_BI.size(0), "g has the shape ", g.sizes(), " and x the shape ", x.sizes(), ".");
  Tensor dx = fresh({needs_dx ? x_BI.size(0) : 0, columns}, x_BI.options());
  Tensor dv = at::empty({0}, values.options());
  if (by == "dense") {
    if (needs_dx) {
      dx = at::mm(g_BO, dense_weight(values, ccol, row, rows, type));
    }
    if (needs_dv) {
      dv = values_of(at::mm(g_BO.t(), x_BI), ccol, row, values.scalar_type());
    }
  } else if (needs_dx || needs_dv) {
    AT_DISPATCH_FLOATING_TYPES(type, "rwfx::sparse_linear_backward", [&] {
      using T = scalar_t;
      const Plan plan = linear_plan<T>(x_BI.size(0), columns, rows, rows);
      dv = multiply_back<T>(
          plan, places_of(ccol, row, crow, {}, {}), values, examples<T>(x_BI, plan), examples<T>(g_BO, plan),
          examples<T>(dx, plan), needs_dx, needs_dv);
    });
  }
  return {needs_dx ? dx.reshape(x.sizes()).to(x.scalar_type()) : at::empty({0}, g.options()), dv};
}

Tensor sparse_conv(
    const Tensor& x, const Tensor& values, const optional<Tensor>& bias, const Tensor& ccol, const Tensor& row,
    const Tensor& crow, const Tensor& col, const Tensor& order, IntArrayRef kernel, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view by) {
  const int64_t rows = crow.numel() - 1, columns = ccol.numel() - 1;
  const Options options{kernel, stride, padding, dilation, groups};
  check_conv(x, rows, options);
  check_operands(x.size(1) / groups * kernel[0] * kernel[1], columns, rows, values, row, bias);
  if (by == "dense") {
    const Tensor full = dense_weight(values, ccol, row, rows, x.scalar_type())
                            .reshape({rows, x.size(1) / groups, kernel[0], kernel[1]});
    const auto b = as_type(bias, x.scalar_type());
    return at::convolution(x, full, b, stride, padding, dilation, false, {0, 0}, groups).contiguous();
  }
  const int64_t height = out_size(x.size(2), options, 0), width = out_size(x.size(3), options, 1);
  const Tensor in = x.to(type_for(x)), y = fresh({x.size(0), rows, height, width}, in.options());
  AT_DISPATCH_FLOATING_TYPES(type_for(x), "rwfx::sparse_conv", [&] {
    using T = scalar_t;
    multiply<T>(
        conv_plan<T>(in, rows, options), places_of(ccol, row, crow, col, order), values, bias,
        images<T>(in, padding[0], padding[1]), images<T>(y));
  });
  return y.to(x.scalar_type());
}

std::tuple<Tensor, Tensor> sparse_conv_backward(
    const Tensor& g, const Tensor& x, const Tensor& values, const Tensor& ccol, const Tensor& row, const Tensor& crow,
    IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, bool needs_dx,
    bool needs_dv, std::string_view by) {
  const int64_t rows = crow.numel() - 1;
  const Options options{kernel, stride, padding, dilation, groups};
  check_conv(x, rows, options);
  check_operands(x.size(1) / groups * kernel[0] * kernel[1], ccol.numel() - 1, rows, values, row, {});
  const std::array<int64_t, 4> sizes{
      x.size(0), rows, out_size(x.size(2), options, 0), out_size(x.size(3), options, 1)};
  TORCH_CHECK_VALUE(g.sizes() == IntArrayRef(sizes), "g has the shape ", g.sizes(), " and y has ", IntArrayRef(sizes));
  Tensor dx = at::empty({0}, g.options()), dv = at::empty({0}, values.options());
  if (by == "dense") {
    const Tensor full = dense_weight(values, ccol, row, rows, x.scalar_type())
                            .reshape({rows, x.size(1) / groups, kernel[0], kernel[1]});
    const auto found = at::convolution_backward(
        g, x, full, {}, stride, padding, dilation, false, {0, 0}, groups, {needs_dx, needs_dv, false});
    dx = needs_dx ? std::get<0>(found).contiguous() : dx;
    dv = needs_dv ? values_of(std::get<1>(found).flatten(1), ccol, row, values.scalar_type()) : dv;
  } else if (needs_dx || needs_dv) {
    const Tensor in = x.to(type_for(x)), grad = g.to(type_for(x));
    const Tensor to = needs_dx ? fresh(x.sizes(), in.options()) : in;  // which is not written to then
    AT_DISPATCH_FLOATING_TYPES(type_for(x), "rwfx::sparse_conv_backward", [&] {
      using T = scalar_t;
      dv = multiply_back<T>(
          conv_plan<T>(in, rows, options), places_of(ccol, row, crow, {}, {}),
          values, images<T>(in, padding[0], padding[1]), images<T>(grad), images<T>(to, padding[0], padding[1]),
          needs_dx, needs_dv);
    });
    dx = needs_dx ? to.to(x.scalar_type()) : dx;
  }
  return {dx, dv};
}

}  // namespace

TORCH_LIBRARY_IMPL(rwfx, CPU, m) {
  m.impl("sparse_linear", sparse_linear);
  m.impl("sparse_linear_backward", sparse_linear_backward);
  m.impl("sparse_conv", sparse_conv);
  m.impl("sparse_conv_backward", sparse_conv_backward);
}

}  // namespace rwfx
