// The kernels of WKV, one body for every instruction set: included with LANES and EACH_LANE set, inside an anonymous
// namespace, so that no other instruction set's copy of a function can take its place. No lambdas, nothing of std::.
//
// Four tokens share one sweep over the state S: S is read and written once for them, and among the four
//
//     q_x = r_x prod_{m<x} w_m     k~_x = k_x prod_{m>x} w_m     A_xz = sum_n r_xn k_zn prod_{z<m<x} w_mn   A_xx: bonus u
//     out_x = q_x S + sum_{z<=x} A_xz v_z                         S <- S + S expm1(log_w_0 + .. + log_w_3) + sum_x k~_x v_x^T
//
// expm1 of the sum, not a product of factors: near w = 1 factors round the same way at every step and the state drifts.
// A missing token has r = k = v = log_w = 0, the identity on the state. The gradient of log_w follows the dyadic tree
// (chunked.py) for four tokens: sums only, so strong decays lose nothing.

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int I __attribute__((vector_size(4 * LANES)));
typedef float Stored __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef unsigned short Half __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define EACH(x) for (int x = 0; x < 4; x++)

constexpr int L = LANES;
constexpr int rows_at_once = 32;             // value rows of S that the backward pass keeps near at a time
constexpr int quads = block_tokens / 4;

// L numbers anywhere in memory. A macro, and Stored for nothing else: clang takes what a reference refers to as aligned
// like the plain vector, and does not align the stack for variables of a type that needs less.
INLINE const Stored* stored(const float* p) { return reinterpret_cast<const Stored*>(p); }
INLINE Stored* stored(float* p) { return reinterpret_cast<Stored*>(p); }
#define at(p) (*stored(p))
INLINE V splat(float x) { return x - V{}; }
INLINE V fma(V a, V b, V c) {                // a b + c
#if LANES == 16
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// ---------------------------------------------------------------------------------------------- bf16 and fp32 rows

INLINE V get(const void* row, long i, bool bf16) {
    if (!bf16) return at(static_cast<const float*>(row) + i);
    const Half h = *reinterpret_cast<const Half*>(static_cast<const unsigned short*>(row) + i);
    return (V)(__builtin_convertvector(h, I) << 16);
}

INLINE void put(void* row, long i, V x, bool bf16) {
    if (!bf16) {
        at(static_cast<float*>(row) + i) = x;
        return;
    }
    const I bits = (I)x, nearest = bits + 0x7fff + ((bits >> 16) & 1);   // ties to even
    const I rounded = (x == x ? nearest : I{} + 0x7fc00000) >> 16;
    *reinterpret_cast<Half*>(static_cast<unsigned short*>(row) + i) = __builtin_convertvector(rounded, Half);
}

INLINE const void* row(const void* base, long index, bool bf16) {
    return static_cast<const char*>(base) + index * (bf16 ? 2 : 4);
}
INLINE void* row(void* base, long index, bool bf16) { return static_cast<char*>(base) + index * (bf16 ? 2 : 4); }

alignas(64) const float zeros[128] = {};

struct Four {                                // the rows of four tokens; those after the last are zeros
    const void* row[4];
};

INLINE Four four(const void* base, long step, long t, long tokens, bool bf16) {
    Four f;
    EACH(x) f.row[x] = t + x < tokens ? row(base, (t + x) * step, bf16) : zeros;
    return f;
}

// -------------------------------------------------------------------------------------------- exponentials, x <= 0

struct Exp {                                 // exp(x) = scale (1 + part), scale a power of two
    V scale, part;
};

INLINE Exp exponential(V x) {
    const V least = splat(-87.336544f), magic = splat(12582912.f);       // exp(least) is the least normal number
    x = x < least ? least : x;
    const V t = fma(x, splat(1.44269504f), magic), n = t - magic;        // magic leaves the nearest integer in the low bits
    const V f = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
    V p = splat(1.9875691500e-4f);                                       // Cephes' expf: exp(f) = 1 + f + f^2 p(f)
    p = fma(p, f, splat(1.3981999507e-3f)), p = fma(p, f, splat(8.3334519073e-3f));
    p = fma(p, f, splat(4.1665795894e-2f)), p = fma(p, f, splat(1.6666665459e-1f)), p = fma(p, f, splat(5.0000001201e-1f));
    return {(V)(((I)t << 23) + 0x3f800000), fma(p, f * f, f)};
}

INLINE V exp(V x) {
    const Exp e = exponential(x);
    const V y = fma(e.scale, e.part, e.scale);
    return x < splat(-87.336544f) ? V{} : y; // 0 where the result would be denormal, and at -inf
}

INLINE V expm1(V x) {                        // keeps full relative accuracy towards 0
    const Exp e = exponential(x);
    return fma(e.scale, e.part, e.scale - 1.f);
}

// ---------------------------------------------------------------------------------------------------- lane sums

// clang wants constants, one for each lane. f(l) >= L: lane f(l) - L of the second vector.
#define PERMUTE(a, b, f) __builtin_shufflevector(a, b, EACH_LANE(f))

template <int D> INLINE V fold(V a, V b) {   // lanes with bit D clear: pair sums of a; set: of b
#define KEEP(l) ((l) & D ? (l) + L : (l))
#define SWAP(l) (KEEP(l) ^ D)
    return PERMUTE(a, b, KEEP) + PERMUTE(a, b, SWAP);
}
template <int D> INLINE V sum(const V* a) {  // lane l = the sum of the lanes of a[l], for 2 D vectors
    if constexpr (D == 0) return a[0];
    else return fold<D>(sum<D / 2>(a), sum<D / 2>(a + D));
}
INLINE void sums(const V (&a)[16], float* out) {
    for (int i = 0; i < 16; i += L) at(out + i) = sum<L / 2>(a + i);
}

template <int D> INLINE void exchange(V* x) {  // the transposition's step: blocks of D lanes between rows D apart
#define LOW(l) ((l) & D ? (l) - D + L : (l))
#define HIGH(l) ((l) & D ? (l) + L : (l) + D)
    for (int l = 0; l < L; l++)
        if (!(l & D)) {
            const V a = x[l], b = x[l + D];
            x[l] = PERMUTE(a, b, LOW), x[l + D] = PERMUTE(a, b, HIGH);
        }
    if constexpr (D > 1) exchange<D / 2>(x);
}

// to[j][i] = from[i][j] for i < rows, j < columns
INLINE void transpose(const float* from, long from_step, float* to, long to_step, int rows, int columns) {
    for (int i = 0; i < rows; i += L)
        for (int j = 0; j < columns; j += L) {
            V x[L];
            for (int l = 0; l < L; l++) x[l] = at(from + (i + l) * from_step + j);
            exchange<L / 2>(x);
            for (int l = 0; l < L; l++) at(to + (j + l) * to_step + i) = x[l];
        }
}

// ------------------------------------------------------------------------------------------------- four tokens

template <int N> struct Decay {              // of four tokens
    float w[4][N], e[N];                     // exp(log_w) of each; expm1 of the sum
};

template <int N> INLINE void decay(const Four& log_w, Decay<N>& d) {
    for (int i = 0; i < N; i += L) {
        V total = {};
        EACH(x) {
            const V l = get(log_w.row[x], i, false);
            at(d.w[x] + i) = exp(l), total += l;
        }
        at(d.e + i) = expm1(total);
    }
}

template <int N> struct Decays {             // static decay: computed once, and once for a last group that is not full
    Decay<N> whole, rest;
};

template <int N> INLINE void decays(const Head& h, Decays<N>& d) {
    if (h.w_step || !h.tokens) return;
    decay<N>(four(h.log_w, 0, 0, 4, false), d.whole);
    if (h.tokens % 4) decay<N>(four(h.log_w, 0, 0, h.tokens % 4, false), d.rest);
}

template <int N> INLINE const Decay<N>& decay_at(const Head& h, long t, const Decays<N>& d, Decay<N>& own) {
    if (!h.w_step) return t + 4 <= h.tokens ? d.whole : d.rest;
    decay<N>(four(h.log_w, h.w_step, t, h.tokens, false), own);
    return own;
}

template <int N> struct Quad {               // what four tokens do to S and to each other
    float q[4][N], k[4][N], e[N], a[16];     // a[4 x + z] = A_xz
};

template <int N> INLINE void quad(const Head& h, long t, const Decay<N>& d, Quad<N>& out) {
    const Four r = four(h.r, h.r_step, t, h.tokens, h.bf16), k = four(h.k, h.k_step, t, h.tokens, h.bf16);
    V a[16] = {};
    for (int i = 0; i < N; i += L) {
        V w[4], rr[4], kk[4];
        EACH(x) w[x] = at(d.w[x] + i), rr[x] = get(r.row[x], i, h.bf16), kk[x] = get(k.row[x], i, h.bf16);
        const V u = at(h.u + i), w01 = w[0] * w[1], w23 = w[2] * w[3];
        at(out.q[0] + i) = rr[0], at(out.q[1] + i) = rr[1] * w[0], at(out.q[2] + i) = rr[2] * w01;
        at(out.q[3] + i) = rr[3] * (w01 * w[2]), at(out.k[0] + i) = kk[0] * (w[1] * w23);
        at(out.k[1] + i) = kk[1] * w23, at(out.k[2] + i) = kk[2] * w[3], at(out.k[3] + i) = kk[3];
        at(out.e + i) = at(d.e + i);
        const V k0w = kk[0] * w[1], r3w = rr[3] * w[2];
        EACH(x) a[5 * x] = fma(rr[x] * u, kk[x], a[5 * x]);
        a[4] = fma(rr[1], kk[0], a[4]), a[9] = fma(rr[2], kk[1], a[9]), a[14] = fma(rr[3], kk[2], a[14]);
        a[8] = fma(rr[2], k0w, a[8]), a[13] = fma(r3w, kk[1], a[13]), a[12] = fma(r3w, k0w, a[12]);
    }
    sums(a, out.a);
}

// fp32 copies of the rows t .. t + count, zeros beyond the last token: the sweeps read single numbers of them
template <int N> INLINE void stage(const void* base, long step, long t, long tokens, bool bf16, int count, float (*out)[N]) {
    for (int x = 0; x < count; x += 4) {
        const Four f = four(base, step, t + x, tokens, bf16);
        EACH(y)
            for (int i = 0; i < N; i += L) at(out[x + y] + i) = get(f.row[y], i, bf16);
    }
}

// four rows on their way to the cache while something else is computed; `write`: to be written in full
template <int N, bool write> INLINE void fetch(const void* base, long step, long t, long tokens, bool bf16) {
    for (int x = 0; x < 4 && t + x < tokens; x++)
        for (int line = 0; line < (bf16 ? N / 32 : N / 16); line++)
            __builtin_prefetch(static_cast<const char*>(row(base, (t + x) * step, bf16)) + 64 * line, write, 2);
}

INLINE long least(long a, long b) { return a < b ? a : b; }

// ----------------------------------------------------------------------------------------------------- forward

template <int N> struct ForwardScratch {
    Decays<N> fixed;
    Decay<N> own;
    Quad<N> quad[quads];
    float v[block_tokens][N];
};

// decoding: the old state is read and the new one written once, `width` vectors of value columns at a time
template <int N, int width> INLINE void one_token(const Forward& h) {
    float r[N], k[N], e[N];
    V bonus = {};
    for (int i = 0; i < N; i += L) {
        const V rr = get(h.r, i, h.bf16), kk = get(h.k, i, h.bf16);
        at(r + i) = rr, at(k + i) = kk, at(e + i) = expm1(at(h.log_w + i));
        bonus = fma(rr * at(h.u + i), kk, bonus);
    }
    float a = 0;
    for (int l = 0; l < L; l++) a += bonus[l];
    for (int j = h.first; j < h.last; j += width * L) {
        V v[width], o[width];
        for (int y = 0; y < width; y++) v[y] = get(h.v, j + y * L, h.bf16), o[y] = a * v[y];
        for (int i = 0; i < N; i++)
            for (int y = 0; y < width; y++) {
                const V s = at(h.state + i * N + j + y * L);
                o[y] = fma(splat(r[i]), s, o[y]);
                at(h.after + i * N + j + y * L) = fma(s, splat(e[i]), fma(splat(k[i]), v[y], s));
            }
        for (int y = 0; y < width; y++) put(h.out, j + y * L, o[y], h.bf16);
    }
}

// during the first and last columns of one block: what the next one will read, and the rows that this one will write
template <int N> INLINE void fetch_around(const Forward& h, long t, int j) {
    const long next = t + block_tokens;
    if (j == h.first) {
        fetch<N, true>(h.out, h.out_step, t + 8, h.tokens, h.bf16);
        fetch<N, false>(h.r, h.r_step, next, h.tokens, h.bf16), fetch<N, false>(h.k, h.k_step, next, h.tokens, h.bf16);
    }
    if (j + 2 * L == h.last) {
        fetch<N, false>(h.v, h.v_step, next, h.tokens, h.bf16);
        if (h.w_step) fetch<N, false>(h.log_w, h.w_step, next, h.tokens, false);
    }
}

// one block of tokens for two vectors of value columns
template <int N> INLINE void columns(const Forward& h, const ForwardScratch<N>& w, long start, long count, int j) {
    for (long n = 0; 4 * n < count; n++) {
        const Quad<N>& f = w.quad[n];
        fetch_around<N>(h, start + 4 * n, j);
        V v[4][2], o[4][2];
        EACH(x)
            for (int y = 0; y < 2; y++) {
                v[x][y] = at(w.v[4 * n + x] + j + y * L), o[x][y] = f.a[4 * x] * v[0][y];
                for (int z = 1; z <= x; z++) o[x][y] = fma(splat(f.a[4 * x + z]), v[z][y], o[x][y]);
            }
        for (int i = 0; i < N; i++) {
            float* S = h.after + i * N + j;
            const V s0 = at(S), s1 = at(S + L);
            V t0 = s0, t1 = s1;
            EACH(x) {
                const V q = splat(f.q[x][i]), k = splat(f.k[x][i]);
                o[x][0] = fma(q, s0, o[x][0]), o[x][1] = fma(q, s1, o[x][1]);
                t0 = fma(k, v[x][0], t0), t1 = fma(k, v[x][1], t1);
            }
            at(S) = fma(s0, splat(f.e[i]), t0), at(S + L) = fma(s1, splat(f.e[i]), t1);
        }
        for (int x = 0; x < 4 && 4 * n + x < count; x++)
            for (int y = 0; y < 2; y++)
                put(row(h.out, (start + 4 * n + x) * h.out_step, h.bf16), j + y * L, o[x][y], h.bf16);
    }
}

INLINE void copy_columns(const float* from, float* to, int n, int first, int last) {
    for (int i = 0; i < n; i++) __builtin_memcpy(to + i * n + first, from + i * n + first, sizeof(float) * (last - first));
}

template <int N> void forward(const Forward& h, void* scratch) {
    ForwardScratch<N>& w = *static_cast<ForwardScratch<N>*>(scratch);
    if (h.tokens == 1) return h.last - h.first < 4 * L ? one_token<N, 2>(h) : one_token<N, 4>(h);
    copy_columns(h.state, h.after, N, h.first, h.last);
    decays<N>(h, w.fixed);
    for (long start = 0; start < h.tokens; start += block_tokens) {
        const long count = least(h.tokens - start, block_tokens);
        const int groups = (count + 3) / 4;
        if (h.saved && start) copy_columns(h.after, h.saved + (start / block_tokens - 1) * h.saved_step, N, h.first, h.last);
        stage<N>(h.v, h.v_step, start, h.tokens, h.bf16, 4 * groups, w.v);
        for (int n = 0; n < groups; n++) quad<N>(h, start + 4 * n, decay_at<N>(h, start + 4 * n, w.fixed, w.own), w.quad[n]);
        for (int j = h.first; j < h.last; j += 2 * L) columns<N>(h, w, start, count, j);
    }
}

// ---------------------------------------------------------------------------------------------------- backward

template <int N> struct BackwardScratch {
    Decays<N> fixed;
    Decay<N> own[quads];
    const Decay<N>* decay[quads];
    Quad<N> quad[quads];
    float da[quads][16];                     // gradient of A
    float v[block_tokens][N], g[block_tokens][N];
    float rs[block_tokens][N], ks[block_tokens][N], ls[quads][N];   // S g, dS v, rowsum(S dS), of each token or group
    float S[quads][rows_at_once][N];         // the states before each group, some value rows of them: [v][k]
    float dS[N][N];                          // [v][k], so that rs, ks and ls add up lane by lane
    float du[N], dw[N];                      // sums over a block first: T may be long
};

template <int N> INLINE void gradient_of_a(const float (*v)[N], const float (*g)[N], float* out) {
    V a[16] = {};
    for (int j = 0; j < N; j += L)
        EACH(x)
            for (int z = 0; z <= x; z++) a[4 * x + z] = fma(at(g[x] + j), at(v[z] + j), a[4 * x + z]);
    sums(a, out);
}

// the states before groups 1, 2, ..: what the forward pass did, transposed
template <int N> INLINE void recompute(BackwardScratch<N>& w, int groups, int p) {
    constexpr int width = N / L < 4 ? N / L : 4;
    for (int n = 0; n + 1 < groups; n++)
        for (int y = 0; y < N; y += width * L) {
            V k[4][width], e[width];
            for (int m = 0; m < width; m++) {
                e[m] = at(w.quad[n].e + y + m * L);
                EACH(x) k[x][m] = at(w.quad[n].k[x] + y + m * L);
            }
            for (int j = 0; j < rows_at_once; j++) {
                V s[width], t[width];
                for (int m = 0; m < width; m++) s[m] = t[m] = at(w.S[n][j] + y + m * L);
                EACH(x) {
                    const V v = splat(w.v[4 * n + x][p + j]);
                    for (int m = 0; m < width; m++) t[m] = fma(v, k[x][m], t[m]);
                }
                for (int m = 0; m < width; m++) at(w.S[n + 1][j] + y + m * L) = fma(s[m], e[m], t[m]);
            }
        }
}

// dv_x = k~_x dS + sum_{z>=x} A_zx g_z for some value rows, from dS before its update: four rows, sixteen sums at a time
template <int N> INLINE void values(const Backward& h, const BackwardScratch<N>& w, int n, long t, int p) {
    alignas(64) float all[4][rows_at_once], s[16];
    for (int j = 0; j < rows_at_once; j += 4) {
        V b[16] = {};
        for (int y = 0; y < N; y += L)
            EACH(m) {
                const V d = at(w.dS[p + j + m] + y);
                EACH(x) b[4 * x + m] = fma(at(w.quad[n].k[x] + y), d, b[4 * x + m]);
            }
        sums(b, s);
        EACH(x) __builtin_memcpy(all[x] + j, s + 4 * x, 16);
    }
    for (int x = 0; x < 4 && t + x < h.tokens; x++)
        for (int j = 0; j < rows_at_once; j += L) {
            V d = at(all[x] + j);
            for (int z = x; z < 4; z++) d = fma(splat(w.quad[n].a[4 * z + x]), at(w.g[4 * n + z] + p + j), d);
            put(row(h.dv, (t + x) * h.step, h.bf16), p + j, d, h.bf16);
        }
}

// rs, ks, ls gain the value rows p .., and dS goes back over the four tokens; one vector of key rows at a time
template <int N> INLINE void sweep(BackwardScratch<N>& w, int n, int p) {
    const Quad<N>& f = w.quad[n];
    for (int y = 0; y < N; y += L) {
        V r[4], k[4], q[4], l = p ? at(w.ls[n] + y) : V{};
        const V e = at(f.e + y);
        EACH(x) {
            q[x] = at(f.q[x] + y);
            r[x] = p ? at(w.rs[4 * n + x] + y) : V{}, k[x] = p ? at(w.ks[4 * n + x] + y) : V{};
        }
        for (int j = 0; j < rows_at_once; j++) {
            const V s = at(w.S[n][j] + y), d = at(w.dS[p + j] + y);
            V t = d;
            l = fma(s, d, l);
            EACH(x) {
                const V g = splat(w.g[4 * n + x][p + j]);
                r[x] = fma(g, s, r[x]), t = fma(g, q[x], t), k[x] = fma(splat(w.v[4 * n + x][p + j]), d, k[x]);
            }
            at(w.dS[p + j] + y) = fma(d, e, t);
        }
        EACH(x) at(w.rs[4 * n + x] + y) = r[x], at(w.ks[4 * n + x] + y) = k[x];
        at(w.ls[n] + y) = l;
    }
}

// from the sums to dr, dk, dlog_w and du: the dyadic tree of four tokens, widest level first, the bonus last
template <int N> INLINE void triangle(const Backward& h, BackwardScratch<N>& s, int n, long t) {
    fetch<N, true>(h.dr, h.step, t + 8, h.tokens, h.bf16), fetch<N, true>(h.dk, h.step, t + 8, h.tokens, h.bf16);
    if (h.w_step) fetch<N, true>(h.d_log_w, h.step, t + 8, h.tokens, false);
    const Four rows_r = four(h.r, h.r_step, t, h.tokens, h.bf16), rows_k = four(h.k, h.k_step, t, h.tokens, h.bf16);
    const float* dA = s.da[n];
    for (int i = 0; i < N; i += L) {
        V w[4], r[4], k[4], a[4], b[4];
        EACH(x) {
            w[x] = at(s.decay[n]->w[x] + i), r[x] = get(rows_r.row[x], i, h.bf16), k[x] = get(rows_k.row[x], i, h.bf16);
            a[x] = at(s.rs[4 * n + x] + i), b[x] = at(s.ks[4 * n + x] + i);
        }
        const V w01 = w[0] * w[1], w23 = w[2] * w[3], k0w = k[0] * w[1], r3w = r[3] * w[2];
        a[1] *= w[0], a[2] *= w01, a[3] *= w01 * w[2];
        b[0] *= w[1] * w23, b[1] *= w23, b[2] *= w[3];
        const V all = w01 * w23 * at(s.ls[n] + i);
        const V lower = fma(r[2], a[2], fma(r[3], a[3], all)), upper = fma(k[0], b[0], fma(k[1], b[1], all));
        a[2] += fma(splat(dA[8]), k0w, dA[9] * k[1]), a[3] = fma(w[2], fma(splat(dA[12]), k0w, dA[13] * k[1]), a[3]);
        b[0] = fma(w[1], fma(splat(dA[8]), r[2], dA[12] * r3w), b[0]), b[1] += fma(splat(dA[9]), r[2], dA[13] * r3w);
        const V d[4] = {fma(r[1], a[1], lower), fma(k[0], b[0], lower), fma(r[3], a[3], upper), fma(k[2], b[2], upper)};
        a[1] = fma(splat(dA[4]), k[0], a[1]), b[0] = fma(splat(dA[4]), r[1], b[0]);
        a[3] = fma(splat(dA[14]), k[2], a[3]), b[2] = fma(splat(dA[14]), r[3], b[2]);
        const V u = at(h.u + i);
        V du = at(s.du + i);
        for (int x = 0; x < 4 && t + x < h.tokens; x++) {
            const V bonus = splat(dA[5 * x]), rk = bonus * k[x];
            du = fma(rk, r[x], du);
            put(row(h.dr, (t + x) * h.step, h.bf16), i, fma(rk, u, a[x]), h.bf16);
            put(row(h.dk, (t + x) * h.step, h.bf16), i, fma(bonus * r[x], u, b[x]), h.bf16);
            if (h.w_step) at(h.d_log_w + (t + x) * h.step + i) = d[x];
            else at(s.dw + i) += d[x];
        }
        at(s.du + i) = du;
    }
}

// during the sweeps over one block, what the block before it will read, and the rows that this one will write
template <int N> INLINE void fetch_around(const Backward& h, long t, int p) {
    const long before = t - block_tokens;
    if (p == 0) {
        if (t >= 4) fetch<N, true>(h.dv, h.step, t - 4, h.tokens, h.bf16);
        if (before >= 0) {
            fetch<N, false>(h.r, h.r_step, before, h.tokens, h.bf16);
            fetch<N, false>(h.k, h.k_step, before, h.tokens, h.bf16);
            if (h.w_step) fetch<N, false>(h.log_w, h.w_step, before, h.tokens, false);
        }
    }
    if (p + rows_at_once == N) {
        if (before >= 0) {
            fetch<N, false>(h.v, h.v_step, before, h.tokens, h.bf16);
            fetch<N, false>(h.g, h.g_step, before, h.tokens, h.bf16);
        }
    }
}

template <int N> INLINE void add_block(float* sum, float* block) {
    for (int i = 0; i < N; i += L) at(sum + i) += at(block + i), at(block + i) = V{};
}

template <int N> void backward(const Backward& h, void* scratch) {
    BackwardScratch<N>& w = *static_cast<BackwardScratch<N>*>(scratch);
    transpose(h.d_after, N, w.dS[0], N, N, N);
    decays<N>(h, w.fixed);
    __builtin_memset(w.du, 0, sizeof w.du), __builtin_memset(w.dw, 0, sizeof w.dw);
    for (long c = (h.tokens + block_tokens - 1) / block_tokens - 1; c >= 0; c--) {
        const long start = c * block_tokens;
        const int groups = (least(h.tokens - start, block_tokens) + 3) / 4;
        stage<N>(h.v, h.v_step, start, h.tokens, h.bf16, 4 * groups, w.v);
        stage<N>(h.g, h.g_step, start, h.tokens, h.bf16, 4 * groups, w.g);
        for (int n = 0; n < groups; n++) {
            w.decay[n] = &decay_at<N>(h, start + 4 * n, w.fixed, w.own[n]);
            quad<N>(h, start + 4 * n, *w.decay[n], w.quad[n]);
            gradient_of_a<N>(w.v + 4 * n, w.g + 4 * n, w.da[n]);
        }
        for (int p = 0; p < N; p += rows_at_once) {
            transpose((c ? h.saved + (c - 1) * h.saved_step : h.state) + p, N, w.S[0][0], N, N, rows_at_once);
            recompute<N>(w, groups, p);
            for (int n = groups - 1; n >= 0; n--) {
                fetch_around<N>(h, start + 4 * n, p);
                values<N>(h, w, n, start + 4 * n, p), sweep<N>(w, n, p);
            }
        }
        for (int n = 0; n < groups; n++) triangle<N>(h, w, n, start + 4 * n);
        add_block<N>(h.du, w.du);
        if (!h.w_step) add_block<N>(h.d_log_w, w.dw);
    }
    transpose(w.dS[0], N, h.d_state, N, N, N);
}

constexpr Kernels kernels = {
    {forward<32>, forward<64>, forward<128>},
    {backward<32>, backward<64>, backward<128>},
    {sizeof(ForwardScratch<32>), sizeof(ForwardScratch<64>), sizeof(ForwardScratch<128>)},
    {sizeof(BackwardScratch<32>), sizeof(BackwardScratch<64>), sizeof(BackwardScratch<128>)},
};
