// Which of the libraries this CPU, and its operating system, can run. Compiled for the baseline CPU in all of them.
#include "library.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// Whether there are matrix tiles of bfloat16 (AMX), and Linux lets this process use them: it wants to be asked, once, before it keeps
// their eight kilobytes for every thread.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr unsigned kTilesOfBFloat16 = 1u << 22, kTiles = 1u << 24;   // of leaf 7's EDX
    constexpr long kRequestPermission = 0x1023, kTileData = 18;          // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTilesOfBFloat16) || !(d & kTiles)) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

}  // namespace

BNR_EXPORT int bnr_cpu_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2")) return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512cd"))
        return 1;
    if (!__builtin_cpu_supports("avx512bf16")) return 2;
    return may_use_tiles() ? 4 : 3;
#else
    return 0;
#endif
}
