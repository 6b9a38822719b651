// The only door between pymerge and a native backend: one plain struct of function pointers.
//
// A backend (each CPU instruction set, the CUDA library) fills one KernelTable. Kernels take raw
// pointers, 64-bit sizes and a stream, know neither torch nor Python, and return a Status. No
// output overlaps an input. On CUDA all data and counters are in device memory and a call only
// queues work: nothing waits for the device. Small arrays of the arguments (models, weights,
// thresholds, lo, shift, hot) are read before a call returns, everywhere. Flags ("non-finite seen")
// are added to on the CPU; CUDA raises them to at least 1.
#pragma once

#include <cstdint>

namespace pymerge {

// A hash of this file and of the .def files, which the build computes (csrc/abi.py). A backend that
// was built from others is refused.
constexpr uint64_t kAbi = PYMERGE_ABI;

enum class Dtype : int32_t { kF32 = 0, kF16 = 1, kBF16 = 2, kF64 = 3 };

enum class Status : int32_t {
  kOk = 0,
  kBadArgument = 1,    // a size, dtype or mode that this backend does not take
  kOutOfMemory = 2,    // workspace could not be allocated
  kDeviceFailure = 3,  // the device reported an error
  kUnknownKind = 4,    // no such kind of an op
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

// Rows of scores and ranks have room for a multiple of so many elements: kernels read and write
// whole vectors.
constexpr int kScoreAlignment = 64;

// out = base + scale * merge of sparse task vectors: csrc/math/sparse.h.
struct SparseArgs {
  Execution execution;
  Dtype compute;
  int32_t num_models;
  int64_t numel;
  Operand base;
  const Operand* models;
  MutableOperand out;
  const int64_t* lo;      // [num_models] least key that is kept; above every key: nothing is
  const int64_t* last;    // [num_models] largest key that is kept
  const int64_t* seeds;   // [num_models][2] words below 2^32, or null: nothing is drawn
  const int64_t* limits;  // [num_models] kept where the hash of the index is at most this
  const double* factors;  // [num_models] of what is kept
  const double* weights;  // [num_models]
  int32_t elect;          // merge what has the sign of the sum
  int32_t divide;         // with elect: by the weights of those that agree
  double divisor;         // 1: no division is made
  double scale;
  int64_t start;  // flat index of the first element in its tensor; no call crosses 2^32
  int64_t* nonfinite;
  // Where there are ranks, they decide in place of the keys: lo <= rank <= last is kept or, with
  // chances, what is drawn with probability chances[k][0] + rank * chances[k][1].
  const int32_t* ranks;   // [num_models][rank_stride], from 0; or null
  const double* chances;  // [num_models][2], or null; needs seeds, and no limits are read
  int64_t rank_stride;
  int32_t per_element;  // with chances: what is kept is divided by its probability
  int32_t bare;         // out = scale * merge, without the base
};

enum class Pointwise : int32_t {
#define PM_POINTWISE(kind, name, reals, models) kind,
#include "pointwise.def"
};

// How many `reals` a kind takes where there are K models; -1: there is no such kind.
static constexpr int64_t pointwise_reals(Pointwise kind, int64_t K) {
  switch (kind) {
#define PM_POINTWISE(kind, name, reals, models) \
  case Pointwise::kind:                         \
    return reals;
#include "pointwise.def"
  }
  return -1;
}

static constexpr bool known(Pointwise kind) { return pointwise_reals(kind, 1) >= 0; }

// out from each element of base and models alone: csrc/math/pointwise.h.
struct PointwiseArgs {
  Execution execution;
  Dtype compute;
  int32_t num_models;
  int64_t numel;
  Operand base;
  const Operand* models;
  MutableOperand out;
  Pointwise op;
  int32_t num_reals;
  const double* reals;
  int64_t* nonfinite;
};

constexpr int kSumChunk = 1024;

// PCB-Merging: max(scale score, 0) for every model, or the merge. reals, by csrc/math/pcb.h, K
// models, P pairs: variant 0 (paper): min[P], inv[P], norm[P], norm[K], q[K], weights[K], scale;
// others: lo[K], hi[K], inv[K], q[K], top[K], inverse of top - q [K], weights[K], scale. Always
// computes in fp32.
struct PcbArgs {
  Execution execution;
  int32_t variant;
  int32_t num_models;
  int64_t numel;
  Operand base;
  const Operand* models;
  MutableOperand out;  // data == null: scores
  float* scores;       // [num_models][stride], room for a multiple of kScoreAlignment; or null
  int64_t stride;
  const float* reals;
  int64_t num_reals;
  int64_t* nonfinite;
};

enum class SumsKind : int32_t {
#define PM_SUMS(kind, name, rows, reals, inputs) kind,
#include "sums.def"
};

// What a kind of sums looks at: see sums.def.
enum class SumsInputs { kAny, kDeltas, kFloatDeltas };

// The rows of partial sums of a kind (-1: there is no such kind), and how many `reals` it takes.
struct SumsShape {
  int64_t rows;
  int64_t reals;
  SumsInputs inputs;
};

static constexpr SumsShape sums_shape(SumsKind kind, int64_t K) {
  switch (kind) {
#define PM_SUMS(kind, name, rows, reals, inputs) \
  case SumsKind::kind:                           \
    return {rows, reals, SumsInputs::inputs};
#include "sums.def"
  }
  return {-1, 0, SumsInputs::kAny};
}

static constexpr bool known(SumsKind kind) { return sums_shape(kind, 1).rows >= 0; }

// Sums over chunks of kSumChunk elements, in a fixed order (csrc/cpu/kernels_sums.h), or over rows
// of `columns` elements: the sums of a row's chunks, which begin at its beginning, in their order.
// With c the number of a chunk or row, x_k the models, or their deltas where there is a base:
// kSparse: partials[2 k][c] = sum |x_k|, partials[2 k + 1][c] = sum of what a sparse merge keeps of
// it; kGram: partials[row][c] = sum x_i x_j for i <= j, row by row. For the paper's PCB, with tau
// the deltas in fp32: kPcbExtremes: partials[2 row][c] and [2 row + 1][c] = least and largest tau_i
// tau_j; kPcbExp: partials[row][c] = sum exp(x_ij), then, for each k, sum exp(K x_kk); reals:
// min[P], inv[P]. kDots: partials[k][c] = sum g x_k, g the last of the models, which is no model
// and from which nothing is subtracted. kStatistics: partials[4 k ..][c] = least x_k, largest x_k,
// sum |x_k|, sum x_k^2. kRamCounts: partials[2 k][c] and [2 k + 1][c] = how many |x_k| > reals[0]
// are the only one of their element, and are not. kEmr: partials[0][c] = sum |x_t|, partials[1][c]
// = sum of |unified| where x_t unified > 0, t = reals[0]. kSce: partials[k][c] = sum x_k^2 where
// the key of the variance is at least lo[0].
struct SumsArgs {
  Execution execution;
  Dtype compute;
  int32_t num_models;
  int64_t numel;
  Operand base;
  const Operand* models;
  SumsKind kind;
  int32_t num_reals;
  const int64_t* lo;  // as in SparseArgs; but for kSce's lo[0], read by kSparse only
  const int64_t* last;
  const int64_t* seeds;
  const int64_t* limits;
  const int32_t* ranks;
  const double* chances;
  int64_t rank_stride;
  int64_t start;
  int64_t columns;     // 0: chunks; else numel is a multiple of it
  int64_t num_chunks;  // or rows
  double* partials;
  const double* reals;  // of kPcbExp: floats
};

// Trimmed task vectors as bit masks and values: bit i of masks[k][j] says whether model k keeps
// element 32 j + i; models[k] are what it keeps, offsets[k][c] of them before chunk c of kSumChunk
// elements (num_chunks + 1 offsets). t_k = models[k] - base there, 0 elsewhere.
// out = base + sum_k weights[k] t_k, or partials[k][c] = sum gradient t_k as kDots of SumsArgs.
struct PackedArgs {
  Execution execution;
  Dtype compute;
  int32_t num_models;
  int64_t numel;
  Operand base;
  const Operand* models;
  const uint32_t* const* masks;
  const int64_t* const* offsets;
  Operand gradient;    // of the dot products
  MutableOperand out;  // data == null: dot products
  const double* weights;
  int64_t num_chunks;
  double* partials;  // null: the sum
};

// out[i][c] = base[i][c] + scale * sum_j b[i][j] a[j][c], in floats and in the order of j; without
// a base (data == null) what would be added. No doubles.
struct LowRankArgs {
  Execution execution;
  int64_t rows;
  int64_t columns;
  int64_t rank;
  Operand base;  // [rows][columns]
  const float* b;
  const float* a;
  double scale;
  MutableOperand out;
};

// ranks[k][i] = rank of |models[k] - base| among the elements of its row of `columns`, from 0; of
// equal magnitudes, that of the lower index is the smaller. Less than 2^31 columns.
struct RanksArgs {
  Execution execution;
  Dtype compute;
  int32_t num_models;
  int64_t numel;  // a multiple of columns
  int64_t columns;
  Operand base;
  const Operand* models;
  int32_t* ranks;  // [num_models][stride], room for a multiple of kScoreAlignment
  int64_t stride;
};

// As WeightedSumArgs with scale 1 and no divisor, with weights of each row: weights[k][row].
struct RowSumArgs {
  Execution execution;
  Dtype compute;
  int32_t num_models;
  int64_t numel;  // a multiple of columns
  int64_t columns;
  Operand base;
  const Operand* models;
  MutableOperand out;
  const double* weights;  // [num_models][rows]; on CUDA in device memory
  int64_t* nonfinite;
};

enum class Divergence : int32_t {
#define PM_DIVERGENCE(kind, name, first, rows) kind,
#include "divergence.def"
};

constexpr int kDivergenceRows = 5;

// The rows of the table that a kind fills; none: there is no such kind.
struct DivergenceRows {
  int first;
  int count;
};

static constexpr DivergenceRows divergence_rows(Divergence kind) {
  switch (kind) {
#define PM_DIVERGENCE(kind, name, first, rows) \
  case Divergence::kind:                       \
    return {first, rows};
#include "divergence.def"
  }
  return {0, 0};
}

static constexpr bool known(Divergence kind) { return divergence_rows(kind).count > 0; }

// What kAll consists of, in order.
constexpr Divergence kDivergenceSteps[] = {Divergence::kMaxima, Divergence::kExp,
                                           Divergence::kDivergence};

// What a row of a model (models[0]; num_models is 1) and of the base have to do with each other, in
// doubles: csrc/math/divergence.h. Chunks, rows and the order of sums are those of SumsArgs. With c
// the number of a chunk or row: kMaxima: table[0][c] = largest model, table[1][c] = largest base;
// kExp: table[2][c] = sum exp(model - table[0][c]), table[3][c] = the same of the base;
// kDivergence: table[4][c] = KL(softmax(model) || softmax(base)), from the rows before it; kAll:
// one after the other. So of a row that is taken by chunks, table[0 .. 3] are what the whole row
// has. kAll is several launches on CUDA, each of which needs the one before: not between begin and
// end.
struct DivergenceArgs {
  Execution execution;
  Dtype compute;
  int32_t num_models;
  int64_t numel;
  Operand base;
  const Operand* models;
  Divergence kind;
  int32_t reserved;
  int64_t columns;     // 0: chunks; else numel is a multiple of it
  int64_t num_chunks;  // or rows
  double* table;       // [kDivergenceRows][num_chunks]; on CUDA in device memory
};

// importance = |models[0] - base| * divergences[row], rounded once; out = it, or with `merge` the
// base, plus the delta where the importance is at least the threshold.
struct ImportanceArgs {
  Execution execution;
  Dtype compute;
  int32_t num_models;  // 1
  int64_t numel;       // a multiple of columns
  int64_t columns;
  Operand base;
  const Operand* models;
  MutableOperand out;
  const double* divergences;  // [rows]; on CUDA in device memory
  double threshold;
  int32_t merge;
  int32_t reserved;
  int64_t* nonfinite;  // of the inputs
};

// What task vectors have to do with each other. K models, D levels, P = K (K - 1) / 2 pairs i < j.
// sums[row][segment], of segments of kHotChunk elements: sum base^2; sum |t_k| [K]; sum |t_i - t_j|
// [P]; sum t_i t_j for i <= j, row by row [P + K]; sum t_k^2 of what is kept at each level [K][D].
// A segment adds up its chunks of kSumChunk, one after the other, and these their elements as
// SumsArgs says; but magnitudes and squares are added in the compute type first, 8 steps of all
// lanes at a time, and these sums in doubles.
// counts, added to. For what is not 0, then for what is kept at each level: elements of each model
// [K]; elements in both of a pair [P]; of these, with opposite signs [P]; and for n = 1 .. K and m
// = 0 .. n / 2, elements in n models of which m have one sign and n - m the other. After these,
// once: elements that are equal in both models of a pair [P]; and magnitudes of each model [K]:
// bins of an eighth of an octave from 2^kComparisonLow on, of which the outermost hold what lies
// beyond; zeros. Of magnitudes, one of `every` elements is counted (1 or kComparisonEvery), in each
// chunk a stretch that its number in the tensor decides. start: flat index of the first element in
// its tensor, a multiple of kHotChunk.
constexpr int kComparisonEvery = 16;
constexpr int kComparisonLow = -48;
constexpr int kComparisonBins = 8 * 64;

struct ComparisonArgs {
  Execution execution;
  Dtype compute;
  int32_t num_models;
  int64_t numel;
  Operand base;
  const Operand* models;
  const int64_t* thresholds;  // [D][K] kept where bits(|t|) is at least this, 1 or more
  int32_t num_levels;
  int32_t every;
  int64_t start;
  int64_t num_segments;
  double* sums;
  int64_t* counts;
};

struct KernelTable {
  uint64_t abi;      // kAbi
  const char* name;  // "baseline", "avx2", "avx512", "cuda"
  Status (*weighted_sum)(const WeightedSumArgs*);
  Status (*ties)(const TiesArgs*);
  Status (*magnitude_histogram)(const HistogramArgs*);
  Status (*magnitude_equal_counts)(const EqualCountsArgs*);
  // The floor of every streaming kernel: reads base and models, writes out, computes nothing.
  Status (*streaming_floor)(const WeightedSumArgs*);

  // Null on the CPU. Between begin and end, calls of the same thread on the same device and stream
  // are queued; those that one kernel can do become one launch. They must not depend on each other.
  Status (*begin)(const Execution*) = nullptr;
  Status (*end)(const Execution*) = nullptr;
  // Whether the device can run these kernels.
  Status (*check)(const Execution*) = nullptr;
  // What the device said when a call of this thread last failed.
  const char* (*last_error)() = nullptr;

  Status (*sparse_merge)(const SparseArgs*) = nullptr;
  Status (*pointwise)(const PointwiseArgs*) = nullptr;
  Status (*chunk_sums)(const SumsArgs*) = nullptr;
  Status (*pcb)(const PcbArgs*) = nullptr;
  Status (*packed)(const PackedArgs*) = nullptr;
  Status (*row_ranks)(const RanksArgs*) = nullptr;
  Status (*row_weighted_sum)(const RowSumArgs*) = nullptr;
  Status (*divergence_sums)(const DivergenceArgs*) = nullptr;
  Status (*row_importance)(const ImportanceArgs*) = nullptr;
  Status (*low_rank)(const LowRankArgs*) = nullptr;    // null on CUDA
  Status (*compare)(const ComparisonArgs*) = nullptr;  // null on CUDA
};

}  // namespace pymerge
