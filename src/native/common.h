// What every part of the native library shares: the C ABI's conventions, errors, and the instruction set.
//
// Convention: every exported function is `extern "C"`, named roost_*, takes pointers and sizes, and returns 0 if it
// succeeds or -1 with a message in roost_error() (one per thread). No exception crosses the boundary: wrap bodies in
// `guarded`.
#pragma once
#include <cstddef>
#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#define ROOST_API extern "C" __attribute__((visibility("default")))

namespace roost {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, amx = 3 };  // scalar: the compiler's baseline (SSE2, NEON)

// Raised whenever an exported function's arguments or their meaning change; roost/native.py loads only its own number.
constexpr int abi = 3;

Isa isa();                                  // the best one of this machine, or the forced one
void set_error(const char* message) noexcept;

struct Error : std::runtime_error {         // a mistake of the caller: its text becomes a ValueError
    using std::runtime_error::runtime_error;
};

template <class F> int guarded(F&& body) noexcept {
    try {
        body();
        return 0;
    } catch (const std::bad_alloc&) {
        set_error("not enough memory");
    } catch (const std::exception& error) {
        set_error(error.what());
    } catch (...) {
        set_error("unknown failure in native code");
    }
    return -1;
}

// Denormals to zero in this thread for a scope, and back: products of strong decays land in 1e-38..1e-45. The rest of the
// mode is set too (round to nearest, nothing traps), so that a worker and a caller with modes of its own compute alike.
// Arithmetic must be behind a call that the compiler cannot inline: it may move plain arithmetic across the change.
struct FlushDenormals {
#if defined(__x86_64__)
    unsigned before = __builtin_ia32_stmxcsr();
    FlushDenormals() { __builtin_ia32_ldmxcsr(0x9fc0); }
    ~FlushDenormals() { __builtin_ia32_ldmxcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;
    FlushDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" ::"r"(uint64_t{1} << 24) : "memory");
    }
    ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(before) : "memory"); }
#else
    FlushDenormals() {}
#endif
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;
};

}  // namespace roost
