// Which instruction set is used: the best of this machine by CPUID (and what the system saves), or a forced lower one.
#include "common.h"

#include <atomic>
#include <cstring>
#include <new>
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace roost {
namespace {

constexpr const char* names[] = {"scalar", "avx2", "avx512", "amx"};
thread_local char message[512] = "";

#if defined(__x86_64__)
bool has_amx() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned tiles = 1u << 24 | 1u << 22 | 1u << 25;  // AMX-TILE, AMX-BF16, AMX-INT8
    if ((d & tiles) != tiles) return false;
#if defined(__linux__)
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;  // tile registers must be asked for
#else
    return false;
#endif
}
#endif

Isa best() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::scalar;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    if (!wide) return Isa::avx2;
    return has_amx() ? Isa::amx : Isa::avx512;
#else
    return Isa::scalar;
#endif
}

const Isa machine = best();
std::atomic<int> forced{-1};

}  // namespace

Isa isa() {
    const int f = forced.load(std::memory_order_relaxed);
    return f < 0 ? machine : static_cast<Isa>(f);
}

void set_error(const char* text) noexcept {
    std::strncpy(message, text, sizeof message - 1);
    message[sizeof message - 1] = 0;
}

}  // namespace roost

ROOST_API const char* roost_error() { return roost::message; }

ROOST_API const char* roost_isa() { return roost::names[static_cast<int>(roost::isa())]; }

ROOST_API const char* roost_best_isa() { return roost::names[static_cast<int>(roost::machine)]; }

// Use another instruction set from now on (tests); null goes back to the best. Models keep the one they were made with.
ROOST_API int roost_force_isa(const char* name) {
    return roost::guarded([&] {
        if (!name) return roost::forced.store(-1);
        for (int i = 0; i < 4; i++)
            if (!std::strcmp(name, roost::names[i])) {
                if (i > static_cast<int>(roost::machine)) throw roost::Error(std::string("this machine has no ") + name);
                return roost::forced.store(i);
            }
        throw roost::Error(std::string("no instruction set is called ") + name);
    });
}
