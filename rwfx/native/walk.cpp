// rwfx::walk on the CPU. What it draws is what the Python implementation in rwfx/ops/walk.py draws from the same state,
// up to the rounding of sums; the words (station, table, junction) are explained there.
//
// A row is read once a step, however many walks stand on it: the walks at a station are ordered by row, the absolute
// weights of a row are summed in blocks, and each walk looks its own number up, first among blocks, then in one.

#include "random.h"
#include "rows.h"

#include <ATen/ops/abs.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <set>
#include <vector>

namespace rwfx {
namespace {

using at::Tensor;

constexpr int64_t BLOCK = 64;  // numbers of a row that are summed together

struct Station {
  int64_t weight, base, size;
  bool ends;
  int64_t groups;
  bool transposed;
  std::vector<int64_t> targets;
};

struct Walker {
  int64_t walk, id;
};

std::vector<Station> unpack(at::IntArrayRef layout) {
  std::vector<Station> stations;
  for (size_t at = 0; at < layout.size();) {
    const int64_t* p = layout.data() + at;
    stations.push_back({p[0], p[1], p[2], p[3] != 0, p[4], p[5] != 0, std::vector<int64_t>(p + 7, p + 7 + p[6])});
    at += 7 + p[6];
  }
  return stations;
}

// |w| ** (1 / temperature) of one row's features, where `weighted` times their factors.
template <typename scalar_t, bool weighted>
class Row {
 public:
  // A product of two small float numbers would be zero.
  using real = std::conditional_t<weighted || std::is_same_v<scalar_t, double>, double, float>;

  Row(const scalar_t* w, const double* factors, int64_t features, double temperature)
      : w_(w), factors_(factors), features_(features), power_(1 / temperature) {
    if (temperature != 1) {
      real largest = 0;
      for (int64_t i = 0; i < features; ++i) {
        largest = std::max(largest, std::abs(static_cast<real>(w[i])));
      }
      largest_ = largest;
    }
  }

  real size(int64_t i) const {
    // Divided by the row's largest first: the power of a large weight would overflow.
    return power_ == 1 ? plain_size(i) : times_factor(std::pow(own(i) / largest_, static_cast<real>(power_)), i);
  }

  // The same where the temperature is 1.
  real plain_size(int64_t i) const {
    return times_factor(own(i), i);
  }

  bool plain() const {
    return power_ == 1;
  }

  int64_t features() const {
    return features_;
  }

  // Whether a row of that sum can be drawn from: it is neither all zero nor has it an infinity or a nan.
  static bool drawable(double total) {
    return total > std::numeric_limits<real>::min() && total <= std::numeric_limits<real>::max();
  }

  // The probability of each feature, where with probability epsilon it is drawn uniformly.
  void chances(double epsilon, double* out) const {
    double total = 0;
    if (plain()) {
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < features_; ++i) {
        out[i] = plain_size(i);
        total += out[i];
      }
    } else {
      for (int64_t i = 0; i < features_; ++i) {
        out[i] = size(i);
        total += out[i];
      }
    }
    if (!drawable(total)) {
      std::fill(out, out + features_, 1.0 / features_);
      return;
    }
    const double by_weight = (1 - epsilon) / total, uniformly = epsilon / features_;
    for (int64_t i = 0; i < features_; ++i) {
      out[i] = out[i] * by_weight + uniformly;
    }
  }

 private:
  real own(int64_t i) const {
    return std::abs(static_cast<real>(w_[i]));
  }

  real times_factor(real own, int64_t i) const {
    if constexpr (weighted) {
      return own * factors_[i];
    } else {
      return own;
    }
  }

  const scalar_t* w_;
  const double* factors_;
  int64_t features_;
  double power_, largest_ = 1;
};

// The sums of a row's sizes over blocks, to draw from.
template <typename Row>
class Sums {
 public:
  using real = typename Row::real;

  Sums(const Row& row, std::vector<double>& block_sums) : row_(row), block_sums_(block_sums) {
    const int64_t features = row.features(), blocks = (features + BLOCK - 1) / BLOCK;
    block_sums_.resize(blocks);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t end = std::min(features, (b + 1) * BLOCK);
      real sum = 0;
      if (row.plain()) {
#pragma omp simd reduction(+ : sum)
        for (int64_t i = b * BLOCK; i < end; ++i) {
          sum += row.plain_size(i);
        }
      } else {
        for (int64_t i = b * BLOCK; i < end; ++i) {
          sum += row.size(i);
        }
      }
      block_sums_[b] = sum;
      total_ += sum;
    }
  }

  bool drawable() const {
    return Row::drawable(total_);
  }

  // The first feature up to which more than the share u of the total lies: one of weight zero is never that.
  int64_t draw(double u) const {
    const double target = u * total_;
    double below = 0;
    int64_t b = 0;
    const int64_t last = static_cast<int64_t>(block_sums_.size()) - 1;
    for (; b < last && below + block_sums_[b] <= target; ++b) {
      below += block_sums_[b];
    }
    const int64_t end = std::min(row_.features(), (b + 1) * BLOCK);
    int64_t found = -1;
    for (int64_t i = b * BLOCK; i < end; ++i) {
      const real own = row_.size(i);
      if (own > 0) {
        found = i;
      }
      below += own;
      if (own > 0 && below > target) {
        return i;
      }
    }
    // Rounding can leave the target at the very end of the block, or of the row: the last feature that has a share.
    while (found < 0) {
      const int64_t i = --b * BLOCK;
      for (int64_t k = i; k < i + BLOCK; ++k) {
        if (row_.size(k) > 0) {
          found = k;
        }
      }
    }
    return found;
  }

 private:
  const Row& row_;
  std::vector<double>& block_sums_;
  double total_ = 0;
};

// A weight of a dtype that rows are read in; integers and complex numbers count by their absolute value.
Tensor of_real(const Tensor& weight) {
  const at::ScalarType dtype = weight.scalar_type();
  const bool real = dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16;
  return real ? weight : at::abs(weight).to(at::kDouble);
}

// The rows of a station's weight, read where they lie: of the usual memory formats nothing is copied.
template <typename scalar_t>
class Rows {
 public:
  using real = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

  Rows(const Tensor& weight, const Station& station)
      : weight_(weight.dim() > 2 ? weight.flatten(2) : weight.unsqueeze(2)),
        w_(weight_.const_data_ptr<scalar_t>()),
        rows_of_group_(station.size / station.groups),
        width_(station.transposed ? weight.size(0) / station.groups : weight.size(1)),
        kernel_(weight_.size(2)),
        feature_stride_(weight_.stride(station.transposed ? 0 : 1)),
        row_stride_(weight_.stride(station.transposed ? 1 : 0)),
        group_stride_(station.transposed ? width_ * feature_stride_ : rows_of_group_ * row_stride_) {}

  // How many features a row reads, and the first of them.
  int64_t width() const {
    return width_;
  }

  int64_t first_feature(int64_t row) const {
    return row / rows_of_group_ * width_;
  }

  // Whether a row's sizes are its numbers, one beside the other.
  bool plain() const {
    return kernel_ == 1 && feature_stride_ == 1;
  }

  const scalar_t* at(int64_t row) const {
    return w_ + row / rows_of_group_ * group_stride_ + row % rows_of_group_ * row_stride_;
  }

  // For each feature the sum of |w| over the kernel.
  void sum_kernel(int64_t row, std::vector<real>& out) const {
    const scalar_t* w = at(row);
    const int64_t stride = weight_.stride(2);
    out.assign(width_, 0);
    if (feature_stride_ == 1) {  // channels last
      for (int64_t k = 0; k < kernel_; ++k) {
        for (int64_t i = 0; i < width_; ++i) {
          out[i] += std::abs(static_cast<real>(w[k * stride + i]));
        }
      }
      return;
    }
    for (int64_t i = 0; i < width_; ++i) {
      for (int64_t k = 0; k < kernel_; ++k) {
        out[i] += std::abs(static_cast<real>(w[i * feature_stride_ + k * stride]));
      }
    }
  }

 private:
  const Tensor weight_;
  const scalar_t* w_;
  int64_t rows_of_group_, width_, kernel_, feature_stride_, row_stride_, group_stride_;
};

// Call `use` with the sizes of a row.
template <typename scalar_t, bool weighted, typename Use>
void with_row(
    const Rows<scalar_t>& rows,
    int64_t row,
    const double* factors,
    double temperature,
    std::vector<typename Rows<scalar_t>::real>& spare,
    const Use& use) {
  const double* own = factors ? factors + rows.first_feature(row) : nullptr;
  if (rows.plain()) {
    use(Row<scalar_t, weighted>(rows.at(row), own, rows.width(), temperature));
  } else {
    rows.sum_kernel(row, spare);
    use(Row<typename Rows<scalar_t>::real, weighted>(spare.data(), own, rows.width(), temperature));
  }
}

// Give every walker, ordered by row, its next feature.
template <typename scalar_t, bool weighted>
void draw_features(
    const Rows<scalar_t>& rows,
    const double* factors,
    const std::vector<Walker>& walkers,
    int64_t base,
    int64_t station,
    double temperature,
    double epsilon,
    const Uniform& uniform,
    std::vector<int64_t>& features) {
  const int64_t width = rows.width(), count = static_cast<int64_t>(walkers.size());
  at::parallel_for(0, count, grain(width), [&](int64_t begin, int64_t end) {
    std::vector<double> block_sums;
    std::vector<typename Rows<scalar_t>::real> spare;
    for (int64_t k = begin; k < end;) {
      const int64_t id = walkers[k].id, first = rows.first_feature(id - base);
      with_row<scalar_t, weighted>(rows, id - base, factors, temperature, spare, [&](const auto& row) {
        const Sums sums(row, block_sums);
        const bool drawable = sums.drawable();
        for (; k < end && walkers[k].id == id; ++k) {
          const uint64_t walk = walkers[k].walk;
          const double u = uniform(2 * station, walk);
          const bool by_weight = drawable && (epsilon == 0 || uniform(2 * station + 1, walk) >= epsilon);
          features[k] = first + (by_weight ? sums.draw(u) : static_cast<int64_t>(u * width));
        }
      });
    }
  });
}

// The probability of each id of a tree to be come by, given where the walks stood at the station above.
class Chances {
 public:
  explicit Chances(const std::vector<Station>& stations) : stations_(stations), nobody_(stations.size(), 1) {
    int64_t ids = 0;
    for (const Station& s : stations) {
      ids = std::max(ids, s.base + s.size);
    }
    visited_.assign(ids, 0);
  }

  // Walks that are dealt to a head: each is at `ids[i]` with the probability `chance[i]`.
  void start(int64_t head, const int64_t* ids, const std::vector<double>& chance, int64_t walks) {
    const Station& s = stations_[head];
    step_.assign(s.size, 0);
    for (size_t i = 0; i < chance.size(); ++i) {
      step_[ids[i] - s.base] += chance[i];
    }
    arrive(head, step_.data(), walks);
  }

  // All walkers of a station, ordered by row, take a step by which a feature leads to the id in its table.
  template <typename scalar_t, bool weighted>
  void step(
      const Station& from,
      const Rows<scalar_t>& rows,
      const double* factors,
      const int64_t* table,
      const std::vector<Walker>& walkers,
      double temperature,
      double epsilon) {
    const int64_t width = rows.width();
    int64_t low = std::numeric_limits<int64_t>::max(), high = 0;
    for (const int64_t target : from.targets) {
      low = std::min(low, stations_[target].base);
      high = std::max(high, stations_[target].base + stations_[target].size);
    }
    bool in_order = from.groups == 1 && high - low == width;  // feature j leads to row j: the usual table
    for (int64_t j = 0; in_order && j < width; ++j) {
      in_order = table[j] == low + j;
    }
    feature_.resize(width);
    std::vector<typename Rows<scalar_t>::real> spare;
    for (size_t k = 0; k < walkers.size();) {
      const int64_t id = walkers[k].id;
      int64_t walks = 0;
      for (; k < walkers.size() && walkers[k].id == id; ++k) {
        ++walks;
      }
      with_row<scalar_t, weighted>(rows, id - from.base, factors, temperature, spare, [&](const auto& row) {
        row.chances(epsilon, feature_.data());
      });
      if (!in_order) {
        const int64_t* next = table + rows.first_feature(id - from.base);
        step_.assign(high - low, 0);
        for (int64_t j = 0; j < width; ++j) {
          if (next[j] >= 0) {
            step_[next[j] - low] += feature_[j];
          }
        }
      }
      double* step = in_order ? feature_.data() : step_.data();
      for (const int64_t target : from.targets) {
        arrive(target, step + stations_[target].base - low, walks);
      }
    }
  }

  // Of a row, where one of `size` rows is drawn in case that no walk arrives, if `fills_up`.
  double of(int64_t station, int64_t row, bool fills_up) const {
    const Station& s = stations_[station];
    return visited_[s.base + row] + (fills_up ? nobody_[station] / static_cast<double>(s.size) : 0);
  }

 private:
  // That at least one of two independent events comes true: 1 - (1 - a) (1 - b), without its cancellation.
  static double either(double a, double b) {
    return a + b * (1 - a);
  }

  // Each of so many walks comes to the station's rows with the probabilities `step`, which is used up.
  void arrive(int64_t station, double* step, int64_t walks) {
    const Station& s = stations_[station];
    double* visited = visited_.data() + s.base;
    double any = 0;
#pragma omp simd reduction(+ : any)
    for (int64_t i = 0; i < s.size; ++i) {
      any += step[i];
    }
    nobody_[station] *= std::pow(std::max(0.0, 1 - any), static_cast<double>(walks));
    for (; walks > 0; walks >>= 1) {  // of 1, 2, 4, ... walks at a time
      if (walks & 1) {
        for (int64_t i = 0; i < s.size; ++i) {
          visited[i] = either(visited[i], step[i]);
        }
      }
      if (walks > 1) {
        for (int64_t i = 0; i < s.size; ++i) {
          step[i] = either(step[i], step[i]);
        }
      }
    }
  }

  const std::vector<Station>& stations_;
  std::vector<double> visited_, nobody_, step_, feature_;
};

// What the starts of a head are drawn by: uniformly, unless there are weights that they can be drawn by.
class Starts {
 public:
  Starts(const Tensor& ids, const Tensor* weights) : ids_(ids.const_data_ptr<int64_t>()), count_(ids.numel()) {
    if (weights) {
      const Tensor given = weights->to(at::kDouble).contiguous();
      weights_.assign(given.const_data_ptr<double>(), given.const_data_ptr<double>() + count_);
      sums_.resize(count_);
      std::partial_sum(weights_.begin(), weights_.end(), sums_.begin());
      const double total = sums_.empty() ? 0 : sums_.back();
      if (!(total > std::numeric_limits<double>::min() && total <= std::numeric_limits<double>::max())) {
        sums_.clear();
      }
    }
  }

  int64_t draw(double u) const {
    if (sums_.empty()) {
      return ids_[static_cast<int64_t>(u * count_)];
    }
    const int64_t choice = std::upper_bound(sums_.begin(), sums_.end(), u * sums_.back()) - sums_.begin();
    return ids_[std::min(choice, count_ - 1)];  // rounding can carry u * total to the total
  }

  const int64_t* ids() const {
    return ids_;
  }

  std::vector<double> chances() const {
    std::vector<double> chances(count_, 1.0 / count_);
    for (size_t i = 0; i < sums_.size(); ++i) {
      chances[i] = weights_[i] / sums_.back();
    }
    return chances;
  }

 private:
  const int64_t* ids_;
  int64_t count_;
  std::vector<double> weights_, sums_;
};

// Order by row, walks in their order within one. Counting beats comparing once the walks are many.
void order(std::vector<Walker>& walkers, const Station& station, std::vector<Walker>& spare, std::vector<int64_t>& begin) {
  if (static_cast<int64_t>(walkers.size()) * 8 < station.size) {
    std::stable_sort(walkers.begin(), walkers.end(), [](const Walker& a, const Walker& b) { return a.id < b.id; });
    return;
  }
  begin.assign(station.size + 1, 0);
  for (const Walker& w : walkers) {
    ++begin[w.id - station.base + 1];
  }
  for (int64_t i = 0; i < station.size; ++i) {
    begin[i + 1] += begin[i];
  }
  spare.resize(walkers.size());
  for (const Walker& w : walkers) {
    spare[begin[w.id - station.base]++] = w;
  }
  walkers.swap(spare);
}

int64_t draw_member(const Tensor& table, int64_t place, double u) {
  const int64_t members = table.size(2);
  const int64_t* ids = table.const_data_ptr<int64_t>() + place * members;
  const int64_t* bits = ids + table.size(1) * members;
  double total;
  std::memcpy(&total, bits + members - 1, sizeof total);
  int64_t choice = 0;
  for (double sum; choice < members - 1; ++choice) {
    std::memcpy(&sum, bits + choice, sizeof sum);
    if (u * total < sum) {
      break;
    }
  }
  return ids[choice];
}

// The kept weights' rows, each with the first walk that came by.
class Visits {
 public:
  explicit Visits(const std::vector<int64_t>& sizes) : first_(sizes.size()) {
    for (size_t k = 0; k < sizes.size(); ++k) {
      first_[k].assign(sizes[k], NEVER);
    }
  }

  void add(int64_t kept, int64_t row, int64_t walk) {
    int64_t& first = first_[kept][row];
    first = std::min(first, walk);
  }

  // The rows visited, topped up with the others of the lowest random keys; with `exactly` above 0 so many, and of the
  // visited ones then those that the first walks came by.
  std::vector<int64_t> rows(int64_t kept, int64_t exactly, int64_t min_rows, uint64_t stream, const Uniform& uniform) {
    std::vector<int64_t>& first = first_[kept];
    const int64_t size = static_cast<int64_t>(first.size());
    if (exactly == size) {
      std::vector<int64_t> all(size);
      std::iota(all.begin(), all.end(), 0);
      return all;
    }
    const auto seen_if = [&](bool wanted) {
      std::vector<int64_t> found;
      for (int64_t row = 0; row < size; ++row) {
        if ((first[row] != NEVER) == wanted) {
          found.push_back(row);
        }
      }
      return found;
    };
    std::vector<int64_t> seen = seen_if(true);
    const int64_t count = static_cast<int64_t>(seen.size());
    const int64_t wanted = exactly > 0 ? exactly : std::max(count, std::min(min_rows, size));
    if (wanted < count) {
      const auto earlier = [&](int64_t a, int64_t b) { return std::pair(first[a], a) < std::pair(first[b], b); };
      std::nth_element(seen.begin(), seen.begin() + wanted, seen.end(), earlier);
      seen.resize(wanted);
      std::sort(seen.begin(), seen.end());
    } else if (wanted > count) {
      std::vector<int64_t> others = seen_if(false);
      const auto key = [&](int64_t row) { return std::pair(uniform.bits(stream, row) >> 2, row); };
      const auto lower = [&](int64_t a, int64_t b) { return key(a) < key(b); };
      std::nth_element(others.begin(), others.begin() + (wanted - count - 1), others.end(), lower);
      seen.insert(seen.end(), others.begin(), others.begin() + (wanted - count));
      std::sort(seen.begin(), seen.end());
    }
    return seen;
  }

 private:
  static constexpr int64_t NEVER = std::numeric_limits<int64_t>::max();
  std::vector<std::vector<int64_t>> first_;
};

std::vector<Tensor> read_last(const Tensor& last, size_t kept, const std::vector<int64_t>& sizes) {
  const int64_t* bounds = last.const_data_ptr<int64_t>();
  const int64_t* numbers = bounds + kept + 1;
  std::vector<Tensor> out;
  int64_t first = 0;
  for (size_t k = 0; k < kept; ++k) {
    Tensor rows = at::empty({bounds[k + 1] - bounds[k]}, last.options());
    int64_t* to = rows.mutable_data_ptr<int64_t>();
    for (int64_t i = bounds[k]; i < bounds[k + 1]; ++i) {
      *to++ = numbers[i] - first;
    }
    out.push_back(rows);
    first += sizes[k];
  }
  out.push_back(last.clone());
  return out;
}

// Why the stations are no tree of weight uses; nothing if they are one.
const char* not_a_tree(const std::vector<Station>& stations, at::IntArrayRef heads) {
  std::set<int64_t> used, led_to(heads.begin(), heads.end());
  if (led_to.size() < heads.size()) {
    return "two heads are one use";
  }
  for (const Station& s : stations) {
    if (s.weight < 0) {
      return "rows are added at a junction";
    }
    if (!used.insert(s.weight).second) {
      return "a weight is used twice";
    }
    for (const int64_t target : s.targets) {
      if (!led_to.insert(target).second) {
        return "a use is led to by two uses, or is a head too";
      }
    }
  }
  return nullptr;
}

void check_shapes(
    const std::vector<Station>& stations,
    at::TensorList weights,
    at::TensorList starts,
    at::TensorList factors,
    at::TensorList start_weights) {
  TORCH_CHECK_VALUE(
      factors.empty() || factors.size() == stations.size(),
      "there are ", factors.size(), " factors for ", stations.size(), " stations: give one for each, or none.");
  for (size_t s = 0; s < factors.size(); ++s) {
    if (stations[s].weight >= 0 && !stations[s].targets.empty()) {
      const Tensor& weight = weights[stations[s].weight];
      const int64_t features = stations[s].transposed ? weight.size(0) : weight.size(1) * stations[s].groups;
      TORCH_CHECK_VALUE(
          factors[s].dim() == 1 && factors[s].size(0) == features,
          "factors[", s, "] has the shape ", factors[s].sizes(), ", the weight there has ", features,
          " features: give one number for each.");
    }
  }
  TORCH_CHECK_VALUE(
      start_weights.empty() || start_weights.size() == starts.size(),
      "there are ", start_weights.size(), " start_weights for ", starts.size(), " heads: give one for each, or none.");
  for (size_t k = 0; k < start_weights.size(); ++k) {
    TORCH_CHECK_VALUE(
        start_weights[k].sizes() == starts[k].sizes(),
        "start_weights[", k, "] has the shape ", start_weights[k].sizes(), ", its head has ", starts[k].numel(),
        " starts: give one number for each.");
  }
}

// The number of walks, then of each kept weight's rows.
at::IntArrayRef read_budget(const Tensor& budget, const std::vector<int64_t>& sizes) {
  const int64_t length = 1 + static_cast<int64_t>(sizes.size());
  TORCH_CHECK_VALUE(
      budget.scalar_type() == at::kLong && budget.dim() == 1 && budget.numel() == length && budget.is_contiguous(),
      "the budget is ", budget.scalar_type(), " ", budget.sizes(), ": it must be contiguous int64 (", length,
      ",), the number of walks and a number of rows for each kept weight.");
  const at::IntArrayRef numbers(budget.const_data_ptr<int64_t>(), length);
  bool fits = numbers[0] >= 0;
  for (size_t k = 0; k < sizes.size(); ++k) {
    fits &= 1 <= numbers[k + 1] && numbers[k + 1] <= sizes[k];
  }
  TORCH_CHECK_VALUE(
      fits, "the budget is ", numbers, ": it needs 0 walks or more, then 1 or more rows of each kept weight's ",
      at::IntArrayRef(sizes), ".");
  return numbers;
}

void check_unbiased(
    const std::vector<Station>& stations,
    at::IntArrayRef heads,
    int64_t num_paths,
    int64_t min_rows,
    at::IntArrayRef exactly,
    int64_t resample_every) {
  const char* reason = not_a_tree(stations, heads);
  TORCH_CHECK_VALUE(!reason, "unbiased needs walks over a tree of weight uses; here ", reason, ".");
  TORCH_CHECK_VALUE(
      exactly.empty(), "unbiased leaves the sizes of row sets to the walks; given are ", exactly, " rows.");
  TORCH_CHECK_VALUE(
      resample_every <= 1, "unbiased needs rows that are drawn at every step; resample_every is ", resample_every, ".");
  TORCH_CHECK_VALUE(min_rows <= 1, "unbiased needs min_rows of 0 or 1, not ", min_rows, ".");
  const int64_t num_heads = static_cast<int64_t>(heads.size());
  TORCH_CHECK_VALUE(
      min_rows == 1 || num_paths >= num_heads, "unbiased needs a row of every head: ", num_paths,
      " walks leave some of the ", num_heads, " heads without one. Draw more walks, or set min_rows=1.");
}

std::vector<Tensor> walk(
    at::TensorList weights,
    at::IntArrayRef kept,
    at::TensorList tables,
    at::IntArrayRef heads,
    at::TensorList starts,
    at::IntArrayRef layout,
    const Tensor& state,
    const Tensor& last,
    int64_t num_paths,
    double temperature,
    double epsilon,
    int64_t min_rows,
    at::IntArrayRef exactly,
    int64_t resample_every,
    std::optional<at::TensorList> factors_given,
    std::optional<at::TensorList> start_weights_given,
    const std::optional<Tensor>& budget,
    bool unbiased) {
  const std::vector<Station> stations = unpack(layout);
  std::vector<int64_t> rows_of(weights.size()), sizes, kept_at(weights.size(), -1);
  for (const Station& s : stations) {
    if (s.weight >= 0) {
      rows_of[s.weight] = s.size;
    }
  }
  for (size_t k = 0; k < kept.size(); ++k) {
    sizes.push_back(rows_of[kept[k]]);
    kept_at[kept[k]] = static_cast<int64_t>(k);
  }
  const at::TensorList factors = factors_given.value_or(at::TensorList());
  const at::TensorList start_weights = start_weights_given.value_or(at::TensorList());
  check_shapes(stations, weights, starts, factors, start_weights);
  if (budget) {
    const at::IntArrayRef numbers = read_budget(*budget, sizes);
    num_paths = numbers[0];
    exactly = numbers.slice(1);
  }
  if (unbiased) {
    check_unbiased(stations, heads, num_paths, min_rows, exactly, resample_every);
  }
  const int64_t seed = state.const_data_ptr<int64_t>()[0], step = state.const_data_ptr<int64_t>()[1];
  if (step % resample_every) {
    return read_last(last, kept.size(), sizes);
  }
  const Uniform uniform = Uniform::of_step(seed, step);
  const int64_t num_stations = static_cast<int64_t>(stations.size());
  const int64_t num_heads = static_cast<int64_t>(heads.size());

  std::vector<std::vector<Walker>> waiting(stations.size());
  std::vector<int64_t> bases, use_of(weights.size());
  for (int64_t s = 0; s < num_stations; ++s) {
    bases.push_back(stations[s].base);
    if (stations[s].weight >= 0) {
      use_of[stations[s].weight] = s;
    }
  }
  const auto send = [&](const Station& from, Walker walker) {
    if (walker.id < 0) {
      return;
    }
    const auto above = std::upper_bound(bases.begin(), bases.end(), walker.id);
    const int64_t target = from.targets.size() == 1 ? from.targets[0] : above - bases.begin() - 1;
    waiting[target].push_back(walker);
  };

  std::optional<Chances> chances;
  if (unbiased) {
    chances.emplace(stations);
  }
  // With fewer walks than output weights, the turn of the first walk moves on from step to step.
  const int64_t turn = static_cast<int64_t>(uniform.key % static_cast<uint64_t>(num_heads));
  for (int64_t k = 0; k < num_heads; ++k) {
    const Starts from(starts[k], start_weights.empty() ? nullptr : &start_weights[k]);
    int64_t dealt = 0;
    for (int64_t walk = (k + turn) % num_heads; walk < num_paths; walk += num_heads, ++dealt) {
      waiting[heads[k]].push_back({walk, from.draw(uniform(2 * num_stations + k, walk))});
    }
    if (chances) {
      chances->start(heads[k], from.ids(), from.chances(), dealt);
    }
  }

  Visits visits(sizes);
  std::vector<Walker> spare;
  std::vector<int64_t> begin, features;
  for (int64_t s = num_stations - 1; s >= 0; --s) {
    std::vector<Walker>& walkers = waiting[s];
    const Station& station = stations[s];
    if (walkers.empty()) {
      continue;
    }
    if (station.weight < 0) {
      for (const Walker& w : walkers) {
        send(station, {w.walk, draw_member(tables[s], w.id - station.base, uniform(2 * s, w.walk))});
      }
      continue;
    }
    order(walkers, station, spare, begin);
    if (const int64_t k = kept_at[station.weight]; k >= 0) {
      for (const Walker& w : walkers) {
        visits.add(k, w.id - station.base, w.walk);
      }
    }
    if (station.targets.empty()) {
      continue;  // every walk ends here: what feature it would leave by is of no use
    }
    features.resize(walkers.size());
    const Tensor weight = of_real(weights[station.weight]);
    const int64_t* table = tables[s].const_data_ptr<int64_t>();
    const Tensor own_factors = factors.empty() ? Tensor() : factors[s].to(at::kDouble).contiguous();
    RWFX_DISPATCH(weight.scalar_type(), "rwfx::walk", [&] {
      const auto draw = [&](auto weighted, const double* f) {
        constexpr bool W = decltype(weighted)::value;
        const Rows<scalar_t> rows(weight, station);
        draw_features<scalar_t, W>(rows, f, walkers, station.base, s, temperature, epsilon, uniform, features);
        if (chances) {
          chances->step<scalar_t, W>(station, rows, f, table, walkers, temperature, epsilon);
        }
      };
      if (own_factors.defined()) {
        draw(std::true_type(), own_factors.const_data_ptr<double>());
      } else {
        draw(std::false_type(), nullptr);
      }
    });
    for (size_t k = 0; k < walkers.size(); ++k) {
      send(station, {walkers[k].walk, table[features[k]]});
    }
  }

  std::vector<Tensor> out;
  Tensor next = at::empty_like(last);
  int64_t* bounds = next.mutable_data_ptr<int64_t>();
  int64_t* numbers = bounds + kept.size() + 1;
  int64_t first = 0, count = 0;
  std::vector<Tensor> scales;
  for (size_t k = 0; k < kept.size(); ++k) {
    const uint64_t stream = 2 * num_stations + num_heads + k;
    const auto set = visits.rows(k, exactly.empty() ? 0 : exactly[k], min_rows, stream, uniform);
    Tensor rows = at::empty({static_cast<int64_t>(set.size())}, last.options());
    std::copy(set.begin(), set.end(), rows.mutable_data_ptr<int64_t>());
    out.push_back(rows);
    if (chances) {
      Tensor scale = at::empty(rows.sizes(), last.options().dtype(at::kFloat));
      float* to = scale.mutable_data_ptr<float>();
      for (const int64_t row : set) {
        *to++ = static_cast<float>(1 / chances->of(use_of[kept[k]], row, min_rows == 1));
      }
      scales.push_back(scale);
    }
    bounds[k] = count;
    for (const int64_t row : set) {
      numbers[count++] = row + first;
    }
    first += sizes[k];
  }
  bounds[kept.size()] = count;
  std::fill(numbers + count, numbers + first, 0);
  out.insert(out.end(), scales.begin(), scales.end());
  out.push_back(next);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(rwfx, CPU, m) {
  m.impl("walk", walk);
}

TORCH_LIBRARY_IMPL(rwfx, AutogradCPU, m) {
  m.impl("walk", torch::CppFunction::makeFallthrough());
}

}  // namespace rwfx
