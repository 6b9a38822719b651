// The input of a launch: records of many tensors, passed as one kernel parameter. Nothing is copied
// to the device beforehand, so a launch is asynchronous and can be captured in a CUDA graph.
#pragma once

#include "cuda/intrinsics.h"
#include "kernel_table.h"

namespace pymerge {
namespace cuda {

constexpr int kThreads = 256;  // of every kernel

// Elements that one block of an elementwise kernel processes: enough to hide the cost of starting a
// block, few enough that a tensor of a million elements fills a device.
constexpr int kTile = 1 << 14;

// Parameters take up to 32764 bytes with CUDA 12.1, and 4096 before.
#if defined(PYMERGE_CUDA_TABLE_BYTES)
constexpr int kTableBytes = PYMERGE_CUDA_TABLE_BYTES;
#elif CUDART_VERSION >= 12010
constexpr int kTableBytes = 32752;
#else
constexpr int kTableBytes = 4080;
#endif

// `count` records of `stride` bytes: a head and then `num_models` models each.
struct Table {
  int32_t count;
  int32_t stride;
  int32_t num_models;
  int32_t reserved;
  alignas(16) char records[kTableBytes - 16];
};

// A head begins with the number of the first block that works on it.
struct Head {
  int32_t first_block;
  int32_t flags;
  int64_t numel;
  const void* base;
  void* out;       // null: statistics only
  int64_t* stats;  // null: none wanted
  double scale;
  double divisor;
  float scale32;  // as a float, too, so that kernels need not convert it each time
  float divisor32;
  int32_t base_dtype;
  int32_t out_dtype;
  int32_t zero_sign;
  uint32_t start;  // for hashes: the low half of the flat index of element 0
};

struct Model {
  const void* data;
  int64_t threshold;
  double weight;
  float weight32;
  int32_t dtype;
};

enum : int32_t {
  kAligned = 1,  // every operand lies at a multiple of 16 bytes
  kDivide = 2,
  kDivideByWeights = 4,
  kWeighBefore = 8,
  kWeighAfter = 16,
  kLargest = 32,
  kElectCount = 64,
  kWantSigns = 128,
  kUniform = 256,  // one dtype, all operands at multiples of its size
  kBare = 512,     // the merge alone, without the base
  kDrawn = 1024,
  kChances = 2048,
  kPerElement = 4096,
};

// For ops that write rows of numbers: `out` is the first row, the others follow `stride` numbers
// apart.
struct RowsHead : Head {
  int64_t stride;
  int64_t columns;  // of the rows of the inputs; 0: the inputs are chunks
};

// Weighted sums with weights[k][row]; `stride` is the number of rows.
struct RowSumHead : RowsHead {
  const double* weights;
  int64_t reserved;
};

// The selection from a task vector: lo <= key <= lo + span, and hashes up to a limit.
struct SparseModel : Model {
  uint64_t span;  // `threshold` is lo
  double factor;
  float factor32;
  uint32_t first, slope;  // the words of its seed (math/sparse.h)
  uint32_t limit;
};

// Ranks decide instead of keys: lo <= rank <= lo + span, or drawn with probability chance + rank *
// spread.
struct RankedModel : SparseModel {
  const int32_t* ranks;
  double chance, spread;
  float chance32, spread32;
};

// Trimmed task vectors, whose kept values are at `data`; see PackedArgs for their layout.
struct PackedHead : RowsHead {
  const void* gradient;
  int32_t gradient_dtype;
  int32_t reserved;
};

struct PackedModel : Model {
  const uint32_t* mask;
  const int64_t* offsets;
};

// The order of the blocks of one record: chunk by chunk, one block for each model.
struct MagnitudeHead {
  int32_t first_block;
  int32_t num_bins;
  int64_t numel;
  int64_t chunk;
  const void* base;
  int32_t base_dtype;
  int32_t reserved[3];
};

struct MagnitudeModel {
  const void* data;
  int64_t lo, hi, hot;  // hi: the last key of the last bin
  int32_t* counts;      // as in HistogramArgs; null: only the hot keys are counted
  int32_t* hot_chunks;  // one or the other, or null
  int64_t* hot_chunks64;
  int32_t shift;
  int32_t dtype;
};

static_assert(sizeof(Head) % 16 == 0 && sizeof(Model) % 16 == 0, "records stay aligned");
static_assert(sizeof(MagnitudeHead) % 16 == 0 && sizeof(MagnitudeModel) % 16 == 0, "the same");
static_assert(sizeof(RowsHead) % 16 == 0 && sizeof(SparseModel) % 16 == 0, "the same");
static_assert(sizeof(PackedHead) % 16 == 0 && sizeof(PackedModel) % 16 == 0, "the same");
static_assert(sizeof(RankedModel) % 16 == 0 && sizeof(RowSumHead) % 16 == 0, "the same");

// Numbers in the precision that a kernel computes in.
template <class F>
PM_DEVICE F weight_of(const Model& model) {
  if constexpr (sizeof(F) == 8) return model.weight;
  return model.weight32;
}

template <class F>
PM_DEVICE F scale_of(const Head& head) {
  if constexpr (sizeof(F) == 8) return head.scale;
  return head.scale32;
}

template <class F>
PM_DEVICE F divisor_of(const Head& head) {
  if constexpr (sizeof(F) == 8) return head.divisor;
  return head.divisor32;
}

template <class F>
PM_DEVICE F factor_of(const SparseModel& model) {
  if constexpr (sizeof(F) == 8) return model.factor;
  return model.factor32;
}

template <class F>
PM_DEVICE F chance_of(const RankedModel& model) {
  if constexpr (sizeof(F) == 8) return model.chance;
  return model.chance32;
}

template <class F>
PM_DEVICE F spread_of(const RankedModel& model) {
  if constexpr (sizeof(F) == 8) return model.spread;
  return model.spread32;
}

// Every kernel takes a table.
using Kernel = void (*)(const Table);

template <class AnyHead>
PM_DEVICE const AnyHead& record(const Table& table, int index) {
  return *reinterpret_cast<const AnyHead*>(table.records + index * table.stride);
}

template <class AnyModel, class AnyHead>
PM_DEVICE const AnyModel* models_of(const AnyHead& head) {
  return reinterpret_cast<const AnyModel*>(&head + 1);
}

// The numbers of a call, which follow its models.
template <class F, class AnyModel>
PM_DEVICE const F* numbers_after(const AnyModel* models, int count) {
  return reinterpret_cast<const F*>(models + count);
}

// The index of a block's record: the last record that begins at or before the block.
template <class AnyHead>
PM_DEVICE int record_of_block(const Table& table) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (record<AnyHead>(table, middle).first_block <= static_cast<int>(blockIdx.x)) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The elements that a block of an elementwise kernel processes.
struct Tile {
  int64_t begin;
  int count;
};

PM_DEVICE Tile tile_of_block(const Head& head) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x - head.first_block) * kTile;
  const int64_t left = head.numel - begin;
  return {begin, left < kTile ? static_cast<int>(left) : kTile};
}

}  // namespace cuda
}  // namespace pymerge
