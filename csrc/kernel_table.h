// The only door between pymerge and a native backend: one plain struct of function pointers.
//
// A backend (each CPU instruction set, later the CUDA library) fills one KernelTable. Kernels take
// raw pointers, 64-bit sizes and a stream, know neither torch nor Python, and return a Status. No
// output overlaps an input.
// Bump kAbiVersion with every change of a struct below; `struct_size` catches the rest.
#pragma once

#include <cstdint>

namespace pymerge {

constexpr uint32_t kAbiVersion = 1;

enum class Dtype : int32_t { kF32 = 0, kF16 = 1, kBF16 = 2, kF64 = 3 };

enum class Status : int32_t {
  kOk = 0,
  kBadArgument = 1,    // a size, dtype or mode that this backend does not take
  kOutOfMemory = 2,    // workspace could not be allocated
  kDeviceFailure = 3,  // the device reported an error
};

// A contiguous run of elements. It need not be aligned, not even to its element size.
struct Operand {
  const void* data;
  Dtype dtype;
  int32_t reserved;
};

struct MutableOperand {
  void* data;
  Dtype dtype;
  int32_t reserved;
};

// Where a call runs. `stream` is a cudaStream_t on CUDA and null on the CPU, where `num_threads`
// counts (0: all that the pool has).
struct Execution {
  void* stream;
  int32_t device;
  int32_t num_threads;
};

// out = sum_k weights[k] * models[k] / divisor                              (base.data == null)
// out = base + scale * (sum_k weights[k] * (models[k] - base) / divisor)    (otherwise)
struct WeightedSumArgs {
  Execution execution;
  Dtype compute;  // kF32 or kF64
  int32_t num_models;
  int64_t numel;
  Operand base;
  const Operand* models;
  MutableOperand out;
  const double* weights;
  double scale;
  double divisor;      // 1: no division is made
  int64_t* nonfinite;  // incremented if any result may have come from NaN or infinity
};

enum class TiesMerge : int32_t { kMeanOfCount = 0, kMeanOfWeights = 1, kSum = 2, kMax = 3 };
enum class Weighting : int32_t { kNone = 0, kBefore = 1, kAfter = 2 };

// See csrc/math/ties.h for the arithmetic.
struct TiesArgs {
  Execution execution;
  Dtype compute;
  int32_t num_models;
  int64_t numel;
  Operand base;
  const Operand* models;
  MutableOperand out;         // data == null: statistics only
  const int64_t* thresholds;  // [num_models] keep where bits(|delta|) >= threshold
  const double* weights;      // [num_models], or null with Weighting::kNone
  Weighting weighting;
  TiesMerge merge;
  int32_t elect_count;  // 0: sign of the sum; 1: sign of the sum of signs
  int32_t zero_sign;    // what a zero sum elects: +1, -1, or 0 for nothing
  double scale;
  int32_t want_signs;  // also fill stats[0] and stats[1]
  int32_t reserved;
  int64_t* stats;  // [3] += {sum of sign(vote), zero votes that kept something, non-finite seen}
};

// Counts of bits(|models[k] - base|), added to counts[slot][k][0 .. num_bins + 2]:
// [0] keys < lo[k]; [1 + j] keys in [lo[k] + (j << shift[k]), lo[k] + ((j + 1) << shift[k]));
// [num_bins + 1] keys above; [num_bins + 2] keys == hot[k], which are counted there and nowhere
// else (-1: none). Each thread counts in a slot of its own; the caller adds the slots up, and must
// do so before 2^31 elements have been counted. hot_chunks, where not null, gets the hot keys of
// each stretch of kHotChunk elements: hot_chunks[k][j], models one row of num_chunks apart.
constexpr int64_t kHotChunk = 1 << 16;

struct HistogramArgs {
  Execution execution;
  Dtype compute;
  int32_t num_models;
  int64_t numel;
  Operand base;
  const Operand* models;
  const int64_t* lo;
  const int64_t* shift;
  const int64_t* hot;
  int64_t num_bins;
  int64_t num_slots;
  int32_t* counts;
  int64_t num_chunks;
  int32_t* hot_chunks;
};

// counts[j] = number of elements in [j * chunk, (j + 1) * chunk) with bits(|model - base|) == key.
struct EqualCountsArgs {
  Execution execution;
  Dtype compute;
  int32_t reserved;
  int64_t numel;
  Operand base;
  Operand model;
  int64_t key;
  int64_t chunk;
  int64_t* counts;
};

struct KernelTable {
  uint32_t abi_version;
  uint32_t struct_size;
  const char* name;  // "baseline", "avx2", "avx512", "cuda"
  Status (*weighted_sum)(const WeightedSumArgs*);
  Status (*ties)(const TiesArgs*);
  Status (*magnitude_histogram)(const HistogramArgs*);
  Status (*magnitude_equal_counts)(const EqualCountsArgs*);
  // The floor of every streaming kernel: reads base and models, writes out, computes nothing.
  Status (*streaming_floor)(const WeightedSumArgs*);
};

}  // namespace pymerge
