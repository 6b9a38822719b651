#include "cpu/tables.h"

namespace pymerge {

int cpu_variants(CpuVariant* variants) {
  variants[0] = {"baseline", baseline_table(), true};
#if defined(PYMERGE_BASELINE_ONLY)
  return 1;
#else
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  variants[1] = {"avx2", avx2_table(), v3};
  variants[2] = {"avx512", avx512_table(), v4};
  return 3;
#endif
}

}  // namespace pymerge
