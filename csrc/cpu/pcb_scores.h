// PCB-Merging: the scores of a vector of elements, and loops for each variant and number of models.
#pragma once

#include "cpu/simd.h"
#include "math/pcb.h"

namespace pymerge {
namespace {

// Kernels have a member template `loop`, compiled for each variant and 2 to 4 models, or any number
// of them: 0.
template <PcbVariant V>
struct PcbKind {
  static constexpr PcbVariant value = V;
};

// Whether no argument of exp can exceed 87, whatever the elements. Those of the paper's variant are
// always clamped.
inline bool pcb_bounded(const PcbCall& call) {
  for (int i = 0; i < call.num_models && call.variant != PcbVariant::kPaper; ++i) {
    const double n = (static_cast<double>(call.hi[i]) - call.lo[i]) * call.inv[i];
    if (!(call.num_models * n * n <= 80)) return false;
  }
  return true;
}

template <int N>
struct PcbWidth {
  static constexpr int value = N;
};

template <class Kernel, PcbVariant kVariant, class... Arguments>
void pcb_with_count(Kernel& kernel, PcbKind<kVariant>, Arguments... arguments) {
  switch (pcb_bounded(kernel.call) ? kernel.call.num_models : 0) {
    case 2:
      return kernel.template loop<kVariant, 2>(arguments...);
    case 3:
      return kernel.template loop<kVariant, 3>(arguments...);
    case 4:
      return kernel.template loop<kVariant, 4>(arguments...);
    default:
      return kernel.template loop<kVariant, 0>(arguments...);
  }
}

template <class Kernel, class... Arguments>
void pcb_with_variant(Kernel& kernel, Arguments... arguments) {
  switch (kernel.call.variant) {
    case PcbVariant::kPaper:
      return pcb_with_count(kernel, PcbKind<PcbVariant::kPaper>{}, arguments...);
    case PcbVariant::kRoot:
      return pcb_with_count(kernel, PcbKind<PcbVariant::kRoot>{}, arguments...);
    case PcbVariant::kVision:
      return pcb_with_count(kernel, PcbKind<PcbVariant::kVision>{}, arguments...);
    case PcbVariant::kVisionEs:
      return pcb_with_count(kernel, PcbKind<PcbVariant::kVisionEs>{}, arguments...);
  }
}

// Calls function(width, first) for 0 to N, four at a time.
template <int N, int kFirst = 0, class Function>
PM_INLINE void in_steps(Function&& function) {
  constexpr int kWidth = N - kFirst < 4 ? N - kFirst : 4;
  function(PcbWidth<kWidth>{}, kFirst);
  if constexpr (kFirst + kWidth < N) in_steps<N, kFirst + kWidth>(function);
}

// The call with everything that is known at compile time; its numbers are copied to where no store
// can change them.
template <PcbVariant kVariant, int K>
struct PcbKnown {
  float numbers[K > 0 ? pcb_reals(kVariant, K > 0 ? K : 1) : 1];

  __attribute__((always_inline)) PcbCall take(const PcbCall& call, const float* reals) {
    if constexpr (K > 0) {
      std::memcpy(numbers, reals, sizeof(numbers));
      return pcb_call(kVariant, K, numbers);
    }
    PcbCall known = call;
    known.variant = kVariant;
    return known;
  }
};

// The scores of K models, several exp or tanh in step. The same as pcb_scores.
template <PcbVariant kVariant, bool kClamped, int K>
PM_INLINE void pcb_scores_in_step(const PcbCall& call, const F (&tau)[K], F (&scores)[K]) {
  constexpr int kPairs = K * (K + 1) / 2;
  const F many = splat<F>(static_cast<float>(K));
  F own[K];
  if constexpr (kVariant == PcbVariant::kPaper) {
    F terms[kPairs];
    PM_UNROLL
    for (int i = 0; i < K; ++i) {
      PM_UNROLL
      for (int j = i; j < K; ++j) {
        terms[pcb_pair(i, j, K)] = pcb_product(call, tau[i], tau[j], i, j);
      }
      own[i] = many * terms[pcb_pair(i, i, K)];
    }
    exp32_of<K, kClamped>(own);
    in_steps<kPairs>(
        [&](auto width, int first) { exp32_of<width.value, kClamped>(terms + first); });
    PM_UNROLL
    for (int i = 0; i < K; ++i) {
      PM_UNROLL
      for (int j = i; j < K; ++j) {
        const int pair = pcb_pair(i, j, K);
        terms[pair] = terms[pair] * splat<F>(call.pair_norm[pair]);
      }
    }
    PM_UNROLL
    for (int i = 0; i < K; ++i) {
      F inter{};
      PM_UNROLL
      for (int j = 0; j < K; ++j) inter = inter + terms[pcb_pair(i, j, K)];
      scores[i] = (own[i] * splat<F>(call.norm[i])) * inter;
    }
  } else {
    F normal[K], inter[K];
    PM_UNROLL
    for (int i = 0; i < K; ++i) {
      normal[i] = pcb_normal(call, tau[i], i);
      own[i] = many * (normal[i] * normal[i]);
    }
    exp32_of<K, kClamped>(own);
    if constexpr (kVariant == PcbVariant::kVisionEs) {
      // Where scores are large, large values of n_i n_i are not rare.
      F squares[K], terms[kPairs];
      PM_UNROLL
      for (int i = 0; i < K; ++i) squares[i] = normal[i] * normal[i];
      tanh32_of<K, false>(squares);
      PM_UNROLL
      for (int i = 0; i < K; ++i) {
        PM_UNROLL
        for (int j = i + 1; j < K; ++j) {
          terms[pcb_pair(i, j, K) - i - 1] = normal[i] * normal[j];
        }
      }
      in_steps<kPairs - K>([&](auto width, int first) { tanh32_of<width.value>(terms + first); });
      PM_UNROLL
      for (int i = 0; i < K; ++i) {
        inter[i] = F{};
        PM_UNROLL
        for (int j = 0; j < K; ++j) {
          const int row = i < j ? i : j;
          inter[i] = inter[i] + (i == j ? squares[i] : terms[pcb_pair(i, j, K) - row - 1]);
        }
      }
    } else {
      F total{};
      PM_UNROLL
      for (int i = 0; i < K; ++i) {
        total = total + (kVariant == PcbVariant::kRoot ? tau[i] : normal[i]);
      }
      PM_UNROLL
      for (int i = 0; i < K; ++i) inter[i] = tau[i] * total;
      tanh32_of<K>(inter);
    }
    PM_UNROLL
    for (int i = 0; i < K; ++i) scores[i] = own[i] * inter[i];
  }
}

}  // namespace
}  // namespace pymerge
