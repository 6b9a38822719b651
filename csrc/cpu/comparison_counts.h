// Counting with bit masks, only for comparison_masks.h. It includes this file with and without
// PM_FAST_ONES, which means an instruction that counts the bits of a vector.

#if PM_FAST_ONES
namespace fast_ones {
PM_INLINE void add_ones(W* counts, W words) { *counts += (W)_mm512_popcnt_epi64((__m512i)words); }
#else
namespace plain_ones {
PM_INLINE void add_ones(W* counts, W words) {
  alignas(PM_VECTOR_BYTES) uint64_t lanes[PM_VECTOR_BYTES / 8];
  store_bits(lanes, (U)words);
  uint64_t total = 0;
  for (uint64_t lane : lanes) total += static_cast<uint64_t>(__builtin_popcountll(lane));
  *reinterpret_cast<uint64_t*>(counts) += total;  // the first lane; all lanes are added up later
}
#endif

// Adds the counts of one level to `counts`: kept[K]; for pairs i < j the elements kept by both, and
// of these the ones with opposite signs; then, for n = 1 .. K models that keep an element and m = 0
// .. n / 2, the elements where m have one sign and n - m the other. Masks of models are `stride`
// words apart. kCount: K, or 0 if it is only known at run time.
template <int kCount>
void count_models(int models, const uint64_t* negative, const uint64_t* kept, int64_t stride,
                  W* counts) {
  constexpr int kRoom = kCount > 0 ? kCount : kMostCompared;
  constexpr int kVector = PM_VECTOR_BYTES / 8;
  const int count = kCount > 0 ? kCount : models;
  const int used = planes_of(count);
  for (int at = 0; at < kBitWords; at += kVector) {
    W own[kRoom], sign[kRoom];
    W more[kPlanes] = {}, less[kPlanes] = {};
    W* found = counts;
#pragma GCC unroll 4
    for (int k = 0; k < count; ++k) {
      own[k] = load_words(kept + k * stride + at);
      sign[k] = load_words(negative + k * stride + at);
      add_ones(found++, own[k]);
      add_planes(more, used, own[k] & ~sign[k]);
      add_planes(less, used, own[k] & sign[k]);
    }
    const int pairs = count * (count - 1) / 2;
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
#pragma GCC unroll 4
      for (int j = i + 1; j < count; ++j, ++found) {
        const W both = own[i] & own[j];
        add_ones(found, both);
        add_ones(found + pairs, both & (sign[i] ^ sign[j]));
      }
    }
    found += pairs;
    W of_more[kRoom + 1], of_less[kRoom + 1];
#pragma GCC unroll 5
    for (int n = 0; n <= count; ++n) {
      of_more[n] = where_number(more, used, n);
      of_less[n] = where_number(less, used, n);
    }
#pragma GCC unroll 5
    for (int n = 1; n <= count; ++n) {
#pragma GCC unroll 5
      for (int m = 0; m <= n / 2; ++m) {
        add_ones(found++, (of_more[m] & of_less[n - m]) | (of_more[n - m] & of_less[m]));
      }
    }
  }
}

void count_level(int models, const uint64_t* negative, const uint64_t* kept, int64_t stride,
                 W* counts) {
  if (models == 2) return count_models<2>(models, negative, kept, stride, counts);
  if (models == 3) return count_models<3>(models, negative, kept, stride, counts);
  if (models == 4) return count_models<4>(models, negative, kept, stride, counts);
  count_models<0>(models, negative, kept, stride, counts);
}

}  // namespace fast_ones or plain_ones
