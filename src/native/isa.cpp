// Which instruction set is used: the best of this machine by CPUID (and what the system saves), or a forced lower one.
#include "common.h"

#include <atomic>
#include <cstring>
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
// A level has everything that the files of its name are compiled with (CMakeLists.txt).
Isa best() {
    struct Leaf {
        unsigned a = 0, b = 0, c = 0, d = 0;
        Leaf(unsigned leaf, unsigned part) { __get_cpuid_count(leaf, part, &a, &b, &c, &d); }
    };
    const auto all = [](unsigned word, std::initializer_list<int> bits) {
        for (int bit : bits)
            if (!(word >> bit & 1)) return false;
        return true;
    };
    const Leaf basic(1, 0), more(7, 0), last(7, 1);
    if (!all(basic.c, {12, 27, 28, 29})) return Isa::scalar;            // FMA, OSXSAVE, AVX, F16C
    unsigned saved, high;                                               // registers that the system keeps for a thread
    asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if (!all(saved, {1, 2}) || !all(more.b, {5})) return Isa::scalar;   // SSE and AVX state; AVX2
    if (!all(saved, {5, 6, 7}) || !all(more.b, {16, 17, 30, 31})        // AVX-512 state; F, DQ, BW, VL
        || !all(more.c, {11}) || !all(last.a, {5})) return Isa::avx2;   // VNNI; BF16
#if ROOST_AMX_EMULATED
    return Isa::amx;
#endif
    if (!all(saved, {17, 18}) || !all(more.d, {22, 24, 25})) return Isa::avx512;  // tiles: state; BF16, TILE, INT8
#if defined(__linux__)
    constexpr int ask_for_state = 0x1023, of_tiles = 18;                // ARCH_REQ_XCOMP_PERM: once for the process
    if (syscall(SYS_arch_prctl, ask_for_state, of_tiles) == 0) return Isa::amx;
#endif
    return Isa::avx512;
}
#else
Isa best() { return Isa::scalar; }
#endif

Isa machine() {
    static const Isa found = best();
    return found;
}

std::atomic<int> forced{-1};

}  // namespace

Isa isa() {
    const int f = forced.load(std::memory_order_relaxed);
    return f < 0 ? machine() : static_cast<Isa>(f);
}

void set_error(const char* text) noexcept {
    std::strncpy(message, text, sizeof message - 1);
    message[sizeof message - 1] = 0;
}

}  // namespace roost

// Which declarations this library was built from.
ROOST_API int roost_abi() { return roost::abi; }

// Why the last call of this thread that returned -1 did so.
ROOST_API const char* roost_error() { return roost::message; }

ROOST_API const char* roost_isa() { return roost::names[static_cast<int>(roost::isa())]; }

ROOST_API const char* roost_best_isa() { return roost::names[static_cast<int>(roost::machine())]; }

// Use another instruction set from now on (tests); null goes back to the best. Models keep the one they were made with.
ROOST_API int roost_force_isa(const char* name) {
    return roost::guarded([&] {
        if (!name) return roost::forced.store(-1);
        for (int i = 0; i < 4; i++)
            if (!std::strcmp(name, roost::names[i])) {
                if (i > static_cast<int>(roost::machine()))
                    throw roost::Error(std::string("this machine has no ") + name);
                return roost::forced.store(i);
            }
        throw roost::Error(std::string("no instruction set is called ") + name);
    });
}
