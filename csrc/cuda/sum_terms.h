// The summands: see kernels_sums.h, and SumsArgs in kernel_table.h for the formulas.
//
// A policy has kSlots sums of type Sum for each term. Each starts as begin(slot), and join(slot, a,
// b) combines two of them.
#pragma once

#include "cuda/table.h"
#include "cuda/values.h"
#include "math/pcb.h"
#include "math/sparse.h"

namespace pymerge {
namespace cuda {

// a + x y. The product of two floats is exact in a double, so rounding once gives the same as
// twice.
PM_DEVICE double add_product(double a, float x, float y) {
  return fma(static_cast<double>(x), static_cast<double>(y), a);
}
PM_DEVICE double add_product(double a, double x, double y) { return a + x * y; }

template <class F>
PM_DEVICE double magnitude_of(F x) {
  return fabs(static_cast<double>(x));
}

struct Nothing {};

// Sums over each model separately.
struct EachModel {
  using ModelType = Model;
  using Sum = double;
  PM_DEVICE int terms(int count) { return count; }
  PM_DEVICE int model(const RowsHead&, int term) { return term; }
  PM_DEVICE double begin(int) { return 0.0; }
  PM_DEVICE double join(int, double a, double b) { return a + b; }
  template <class F, class Inputs>
  PM_DEVICE Nothing shared(const Inputs&, const RowsHead&, const Model*, int) {
    return {};
  }
};

// |delta|, and the part of it that a sparse merge keeps.
template <class Kept>
struct SparseTerms : EachModel {
  using ModelType = typename Kept::ModelType;
  static constexpr int kSlots = 2;

  template <class F, class Inputs>
  PM_DEVICE void add(double (&sums)[2], const Inputs& inputs, Nothing, const RowsHead& head,
                     const ModelType& model) {
    const F delta = inputs.delta(model);
    const uint32_t mixed = mask_mix(head.start + static_cast<uint32_t>(inputs.at));
    sums[0] += magnitude_of(delta);
    sums[1] += magnitude_of(Kept::template keep<F>(delta, head, model, mixed, inputs.at));
  }
};

// Products with the last model, which is a gradient.
struct DotTerms : EachModel {
  static constexpr int kSlots = 1;
  PM_DEVICE int terms(int count) { return count - 1; }
  template <class F, class Inputs>
  PM_DEVICE F shared(const Inputs& inputs, const RowsHead&, const Model* models, int count) {
    return inputs.plain(models[count - 1]);
  }
  template <class F, class Inputs>
  PM_DEVICE void add(double (&sums)[1], const Inputs& inputs, F gradient, const RowsHead&,
                     const Model& model) {
    sums[0] = add_product(sums[0], gradient, inputs.delta(model));
  }
};

// Smallest, largest, sum of magnitudes and of squares. NaN is left out of the extremes.
struct StatisticsTerms : EachModel {
  static constexpr int kSlots = 4;
  PM_DEVICE double begin(int slot) {
    constexpr double kMost = __builtin_inf();
    return slot == 0 ? kMost : slot == 1 ? -kMost : 0.0;
  }
  PM_DEVICE double join(int slot, double a, double b) {
    if (slot == 0) return b < a ? b : a;
    if (slot == 1) return b > a ? b : a;
    return a + b;
  }
  template <class F, class Inputs>
  PM_DEVICE void add(double (&sums)[4], const Inputs& inputs, Nothing, const RowsHead&,
                     const Model& model) {
    const F x = inputs.delta(model);
    sums[0] = join(0, sums[0], x);
    sums[1] = join(1, sums[1], x);
    sums[2] += magnitude_of(x);
    sums[3] = add_product(sums[3], x, x);
  }
};

// RAM: counts the elements that one model alone changed, and those that others changed, too.
// `scale` is epsilon.
struct RamTerms : EachModel {
  static constexpr int kSlots = 2;
  template <class F, class Inputs>
  PM_DEVICE bool shared(const Inputs& inputs, const RowsHead& head, const Model* models,
                        int count) {
    int active = 0;
    for (int k = 0; k < count; ++k) {
      active += fabs(inputs.delta(models[k])) > scale_of<F>(head) ? 1 : 0;
    }
    return active > 1;
  }
  template <class F, class Inputs>
  PM_DEVICE void add(double (&sums)[2], const Inputs& inputs, bool others, const RowsHead& head,
                     const Model& model) {
    const double one = fabs(inputs.delta(model)) > scale_of<F>(head) ? 1.0 : 0.0;
    sums[0] += others ? 0.0 : one;
    sums[1] += others ? one : 0.0;
  }
};

// EMR: |tau_t|, and the part of the unified vector that its mask keeps. `scale` is t.
struct EmrTerms : EachModel {
  static constexpr int kSlots = 2;
  PM_DEVICE int terms(int) { return 1; }
  PM_DEVICE int model(const RowsHead& head, int) { return static_cast<int>(head.scale); }

  template <class F>
  struct Unified {
    bool positive;
    F largest;
  };
  template <class F, class Inputs>
  PM_DEVICE Unified<F> shared(const Inputs& inputs, const RowsHead&, const Model* models,
                              int count) {
    F sum = 0, largest = 0;
    for (int k = 0; k < count; ++k) sum = sum + inputs.delta(models[k]);
    for (int k = 0; k < count; ++k) {
      const F x = inputs.delta(models[k]);
      const F aligned = sum > 0 ? x : -x;
      largest = aligned > largest ? aligned : largest;
    }
    return {sum > 0, largest};
  }
  template <class F, class Inputs>
  PM_DEVICE void add(double (&sums)[2], const Inputs& inputs, Unified<F> unified, const RowsHead&,
                     const Model& model) {
    const F own = inputs.delta(model);
    const bool agrees = unified.positive ? own > 0 : own < 0;
    sums[0] += magnitude_of(own);
    sums[1] += magnitude_of(agrees ? unified.largest : F{});
  }
};

// SCE: squares of each task vector where the variance of the models has a key at or above the
// threshold.
struct SceTerms : EachModel {
  static constexpr int kSlots = 1;
  template <class F, class Inputs>
  PM_DEVICE bool shared(const Inputs& inputs, const RowsHead&, const Model* models, int count) {
    const F many = static_cast<F>(count);
    F sum = 0, squares = 0;
    for (int k = 0; k < count; ++k) sum = sum + inputs.delta(models[k]);
    const F mean = sum / many;
    for (int k = 0; k < count; ++k) {
      const F apart = inputs.delta(models[k]) - mean;
      squares = squares + apart * apart;
    }
    return magnitude_key(squares / many) >= models[0].threshold;
  }
  template <class F, class Inputs>
  PM_DEVICE void add(double (&sums)[1], const Inputs& inputs, bool chosen, const RowsHead&,
                     const Model& model) {
    const F x = chosen ? inputs.delta(model) : F{};
    sums[0] = add_product(sums[0], x, x);
  }
};

// Sums over pairs of models.
struct GramPairs {
  using Sum = double;
  static constexpr int kSlots = 1;
  PM_DEVICE double begin(int) { return 0.0; }
  PM_DEVICE double join(int, double a, double b) { return a + b; }
  PM_DEVICE int64_t row(int, int i, int j, int count) { return pcb_pair(i, j, count); }
  template <class F>
  PM_DEVICE void add(double (&sums)[1], F x, F y, bool, const Model*, int, int, int) {
    sums[0] = add_product(sums[0], x, y);
  }
};

// Smallest and largest product of PCB. Non-finite products are left out.
struct ExtremePairs {
  using Sum = float;
  static constexpr int kSlots = 2;
  PM_DEVICE float begin(int slot) { return slot == 0 ? __builtin_inff() : -__builtin_inff(); }
  PM_DEVICE double join(int slot, double a, double b) {
    return (slot == 0 ? b < a : b > a) ? b : a;
  }
  PM_DEVICE int64_t row(int slot, int i, int j, int count) {
    return 2 * pcb_pair(i, j, count) + slot;
  }
  template <class F>
  PM_DEVICE void add(float (&sums)[2], F x, F y, bool, const Model*, int, int, int) {
    const float product = static_cast<float>(x) * static_cast<float>(y);
    const bool finite = is_finite(product);
    sums[0] = finite & (product < sums[0]) ? product : sums[0];
    sums[1] = finite & (product > sums[1]) ? product : sums[1];
  }
};

// Sums of exp of the scaled products of PCB; after all pairs, of exp of K times the models' own
// products.
struct ExpPairs {
  using Sum = double;
  static constexpr int kSlots = 2;
  PM_DEVICE double begin(int) { return 0.0; }
  PM_DEVICE double join(int, double a, double b) { return a + b; }
  PM_DEVICE int64_t row(int slot, int i, int j, int count) {
    if (slot == 0) return pcb_pair(i, j, count);
    return i == j ? count * (count + 1) / 2 + i : -1;
  }
  PM_DEVICE double known(float x) { return x == x ? x : 0.0f; }
  template <class F>
  PM_DEVICE void add(double (&sums)[2], F x, F y, bool same, const Model* models, int i, int j,
                     int count) {
    const float* reals = numbers_after<float>(models, count);
    const int pairs = count * (count + 1) / 2;
    const int pair = pcb_pair(i < count ? i : count - 1, j < count ? j : count - 1, count);
    const float product = static_cast<float>(x) * static_cast<float>(y);
    const float scaled = (product - reals[pair]) * reals[pairs + pair];
    sums[0] += known(exp32(scaled));
    if (same) sums[1] += known(exp32(static_cast<float>(count) * scaled));
  }
};

}  // namespace cuda
}  // namespace pymerge
