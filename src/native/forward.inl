// One pass of Eagle or Finch over M tokens of n sequences, by all threads of a region together: the equations of
// models/eagle.py and models/finch.py in stages, one barrier after each.
//
// In every stage a thread owns columns (units of 64), never rows, so each number is computed by one thread in one order:
// bits do not depend on the number of threads, on how tokens are cut into passes, or on which sequences share a pass.
// Included after matmul.inl, once per instruction set.

namespace {

constexpr float norm_eps = 1e-5f;

struct Norm { float mean, scale; };
inline Norm statistics(const float* x, long n, float eps) {
    V total = V{}, squares = V{};
    const long whole = n / lanes * lanes;
    for (long i = 0; i < whole; i += lanes) total += load(x + i);
    float rest = 0;
    for (long i = whole; i < n; i++) rest += x[i];
    const float mean = (sum(total) + rest) / static_cast<float>(n);
    rest = 0;
    for (long i = 0; i < whole; i += lanes) {
        const V d = load(x + i) - mean;
        squares = fma(d, d, squares);
    }
    for (long i = whole; i < n; i++) rest += (x[i] - mean) * (x[i] - mean);
    return {mean, 1.f / __builtin_sqrtf((sum(squares) + rest) / static_cast<float>(n) + eps)};
}

inline float normalise(float x, Norm s, float w, float b) { return (x - s.mean) * s.scale * w + b; }

// how many columns the unit that begins at c has: 64, or what is left before `end`
inline long narrow(long c, long end) { return c + unit < end ? unit : end - c; }

template <class F> inline void columns(const Region& region, long width, F&& body) {
    long first, last;
    region.slice(width, unit, first, last);
    for (long c = first; c < last; c += unit) body(c, narrow(c, width));
}

// several matrices with the same number of rows share one stage: their columns are laid end to end
struct Task { const Matrix* W; const Activations* in; };
template <class F> inline void products(const Region& region, const Task* tasks, int count, long M, float* tile, F&& use) {
    long all = 0, first, last, base = 0;
    for (int i = 0; i < count; i++) all += (tasks[i].W->N + unit - 1) / unit;
    region.slice(all, 1, first, last);
    for (int i = 0; i < count; i++) {
        const long units = (tasks[i].W->N + unit - 1) / unit;
        for (long u = first > base ? first - base : 0; u < units && base + u < last; u++) {
            multiply(*tasks[i].W, u * unit, *tasks[i].in, M, tile);
            use(i, u * unit, narrow(u * unit, tasks[i].W->N));
        }
        base += units;
    }
}

inline Activations plain(float* values, long stride) {
    Activations a{};
    a.kind = Inputs::f32, a.K = stride, a.values = values;
    return a;
}

struct Worker {
    const Model& m;
    const Pass& p;
    const Region& region;
    float* tile = p.own + region.thread * p.own_stride;
    float* second = tile + p.own_stride / 2;

    // the thread's columns of every row's layer norm
    void norm(const float* w, const float* b) {
        for (long t = 0; t < p.M; t++) {
            const Norm s = statistics(p.x + t * m.D, m.D, norm_eps);
            columns(region, m.D, [&](long c, long n) {
                for (long i = c; i < c + n; i++) p.normed[t * m.D + i] = normalise(p.x[t * m.D + i], s, w[i], b[i]);
            });
        }
    }
    // that norm one token earlier: of the row before, or from the state at the start of a sequence
    const float* before(long t, long sequence, const float* shift) const {
        return t == p.offsets[sequence] ? shift + sequence * m.D : p.normed + (t - 1) * m.D;
    }
    // the last normed input of every sequence becomes its shift state; a sequence without tokens keeps what it has
    void keep(const float* from, float* to) {
        for (long s = 0; s < p.n; s++) {
            const long a = p.offsets[s], b = p.offsets[s + 1];
            const float* last = b > a ? p.normed + (b - 1) * m.D : from + s * m.D;
            if (last != to + s * m.D)
                columns(region, m.D, [&](long c, long n) { memcpy(to + s * m.D + c, last + c, sizeof(float) * n); });
        }
    }
    template <class F> void rows(F&& body) {            // every token with the sequence it belongs to
        for (long s = 0; s < p.n; s++)
            for (long t = p.offsets[s]; t < p.offsets[s + 1]; t++) body(t, s);
    }

    // Inputs mixed of a token and the one before it: Finch a_t + (a_{t-1} - a_t) maa, Eagle a_{t-1} + (a_t - a_{t-1}) mix
    void interpolate(const float* mix, const Activations& out, const float* shift, bool eagle) {
        rows([&](long t, long s) {
            const float *now = p.normed + t * m.D, *then = before(t, s, shift);
            columns(region, m.D, [&](long c, long n) {
                float y[unit];
                for (long i = 0; i < n; i++) {
                    const long j = c + i;
                    y[i] = eagle ? then[j] + mix[j] * (now[j] - then[j]) : now[j] + (then[j] - now[j]) * mix[j];
                }
                prepare(out, t, c, y, n);
            });
        });
    }

    void embed() {
        rows([&](long t, long) {
            float* x = p.x + t * m.D;
            if (p.tokens) {
                const long row = p.tokens[t] * m.D;
                columns(region, m.D, [&](long c, long n) {
                    for (long i = c; i < c + n; i++)
                        x[i] = m.embedding_bf16 ? bf16_to_float(static_cast<const uint16_t*>(m.embedding)[row + i])
                                                : static_cast<const float*>(m.embedding)[row + i];
                });
            } else {
                columns(region, m.D, [&](long c, long n) { memcpy(x + c, p.embeddings + t * m.D + c, sizeof(float) * n); });
            }
        });
        region.wait();
        norm(m.ln0_w, m.ln0_b);
        region.wait();
        columns(region, m.D, [&](long c, long n) {
            for (long t = 0; t < p.M; t++) memcpy(p.x + t * m.D + c, p.normed + t * m.D + c, sizeof(float) * n);
        });
        region.wait();
    }

    void token_shift(const Layer& l, const LayerState& state) {
        norm(l.ln1_w, l.ln1_b);
        if (!m.finch) {
            const Matrix* used[5] = {nullptr, &l.k, &l.v, &l.r, m.gate ? &l.g : nullptr};
            for (int i = 1; i < 5; i++)
                if (used[i]) interpolate(l.mix[i], p.in[i], state.att, true);
            region.wait();
            return;
        }
        interpolate(l.mix_x, p.shift_in, state.att, false);
        region.wait();
        const Task low = {&l.shift1, &p.shift_in};
        products(region, &low, 1, p.M, tile, [&](int, long c, long n) { tanh_into(p.low, 5 * m.shift_rank, c, n); });
        region.wait();
        for (int i = 0; i < 5; i++) {
            const Activations low = plain(p.low + i * m.shift_rank, 5 * m.shift_rank);
            columns(region, m.D, [&](long c, long n) {
                multiply(l.shift2[i], c, low, p.M, tile);
                rows([&](long t, long s) {
                    const float *now = p.normed + t * m.D, *then = before(t, s, state.att), *by = tile + t * unit;
                    float y[unit];
                    for (long j = 0; j < n; j++)
                        y[j] = now[c + j] + (then[c + j] - now[c + j]) * (l.mix[i][c + j] + by[j]);
                    prepare(p.in[i], t, c, y, n);
                });
            });
        }
        region.wait();
    }
    void tanh_into(float* out, long stride, long c, long n) {
        for (long t = 0; t < p.M; t++) {
            for (long i = 0; i < unit; i += lanes) store(tile + t * unit + i, tanh(load(tile + t * unit + i)));
            memcpy(out + t * stride + c, tile + t * unit, sizeof(float) * n);
        }
    }

    void project(const Layer& l) {
        Task tasks[5] = {{&l.r, &p.in[3]}, {&l.k, &p.in[1]}, {&l.v, &p.in[2]}};
        float* out[4] = {p.r, p.k, p.v, p.g};
        int count = 3;
        if (m.gate) tasks[count++] = {&l.g, &p.in[4]};
        const int decay = count;
        if (m.finch) tasks[count++] = {&l.decay1, &p.in[0]};
        products(region, tasks, count, p.M, tile, [&](int i, long c, long n) {
            if (i == decay) return tanh_into(p.decay_low, m.decay_rank, c, n);
            for (long t = 0; t < p.M; t++) memcpy(out[i] + t * m.A + c, tile + t * unit, sizeof(float) * n);
        });
        region.wait();
    }

    // WKV, group norm and gate of the heads in columns [c, c + n): `tile` gets w - 1, `second` the output. Heads
    // have 16, 32 or 64 channels, so none lies in two units
    void recur(const Layer& l, const LayerState& state, long c, long n) {
        if (m.finch) {
            const Activations low = plain(p.decay_low, m.decay_rank);
            multiply(l.decay2, c, low, p.M, tile);
        }
        for (long t = 0; t < p.M; t++)
            for (long i = 0; i < n; i += lanes) {
                const V d = m.finch ? load(l.decay + c + i) + load(tile + t * unit + i) : load(l.decay + c + i);
                store(tile + t * unit + i, expm1(-exp(minimum(d, splat(10.f)))));
            }
        for (long s = 0; s < p.n; s++)
            for (long at = c; at < c + n; at += m.N) {
                const long head = (s * (m.A / m.N) + at / m.N) * m.N * m.N;
                float* S = state.wkv_out + head;
                if (S != state.wkv + head) memcpy(S, state.wkv + head, sizeof(float) * m.N * m.N);
                long t = p.offsets[s];
                for (; t + 4 <= p.offsets[s + 1]; t += 4) steps<4>(l, S, t, at, c);
                for (; t < p.offsets[s + 1]; t++) steps<1>(l, S, t, at, c);
            }
        for (long t = 0; t < p.M; t++) {
            float* y = second + t * unit;
            for (long at = 0; at < n; at += m.N) {
                const Norm norm = statistics(y + at, m.N, m.group_norm_eps);
                for (long i = at; i < at + m.N; i++)
                    y[i] = normalise(y[i], norm, l.lnx_w[c + i], l.lnx_b[c + i]);
            }
            if (m.gate)
                for (long i = 0; i < n; i += lanes) {
                    const V g = load(p.g + t * m.A + c + i);
                    store(y + i, load(y + i) * (g * sigmoid(g)));
                }
            prepare(p.out_in, t, c, y, n);
        }
    }
    // T tokens of one head in one sweep over S (key rows i, value columns j); the order of operations on every number
    // is that of T single steps: o += r_i S_ij, then S_ij += (w_i - 1) S_ij + k_i v_j
    template <int T> void steps(const Layer& l, float* S, long t, long at, long c) {
        const float *r[T], *k[T], *v[T], *w[T];
        float bonus[T];
        for (int x = 0; x < T; x++) {
            const long o = (t + x) * m.A + at;
            r[x] = p.r + o, k[x] = p.k + o, v[x] = p.v + o, w[x] = tile + (t + x) * unit + at - c;
            V b = V{};
            for (long i = 0; i < m.N; i += lanes) b = fma(load(r[x] + i) * load(l.bonus + at + i), load(k[x] + i), b);
            bonus[x] = sum(b);
        }
        for (long j = 0; j < m.N; j += lanes) {
            V o[T], values[T];
            for (int x = 0; x < T; x++) o[x] = V{}, values[x] = load(v[x] + j);
            for (long i = 0; i < m.N; i++) {
                V s = load(S + i * m.N + j);
                for (int x = 0; x < T; x++) {
                    o[x] = fma(splat(r[x][i]), s, o[x]);
                    s += fma(s, splat(w[x][i]), k[x][i] * values[x]);
                }
                store(S + i * m.N + j, s);
            }
            for (int x = 0; x < T; x++) store(second + (t + x) * unit + at - c + j, fma(splat(bonus[x]), values[x], o[x]));
        }
    }

    void time_mix(const Layer& l, const LayerState& state) {
        token_shift(l, state);
        project(l);
        keep(state.att, state.att_out);
        columns(region, m.A, [&](long c, long n) { recur(l, state, c, n); });
        region.wait();
        const Task out = {&l.o, &p.out_in};
        products(region, &out, 1, p.M, tile, [&](int, long c, long n) {
            for (long t = 0; t < p.M; t++)
                for (long i = 0; i < n; i++) p.x[t * m.D + c + i] += tile[t * unit + i];
        });
        region.wait();
    }

    void channel_mix(const Layer& l, const LayerState& state) {
        norm(l.ln2_w, l.ln2_b);
        interpolate(l.ffn_mix_k, p.ffn_k_in, state.ffn, !m.finch);
        interpolate(l.ffn_mix_r, p.ffn_r_in, state.ffn, !m.finch);
        region.wait();
        const Task in[2] = {{&l.ffn_k, &p.ffn_k_in}, {&l.ffn_r, &p.ffn_r_in}};
        keep(state.ffn, state.ffn_out);
        long& zero = p.zeros[8 * region.thread];
        products(region, in, 2, p.M, tile, [&](int i, long c, long n) {
            for (long t = 0; t < p.M; t++) {
                float* y = tile + t * unit;
                if (i == 0) {
                    for (long j = 0; j < n; j++) zero += y[j] <= 0, y[j] = y[j] <= 0 ? 0.f : y[j] * y[j];
                    prepare(p.ffn_v_in, t, c, y, n);
                } else {
                    for (long j = 0; j < unit; j += lanes) store(y + j, sigmoid(load(y + j)));
                    memcpy(p.receptance + t * m.D + c, y, sizeof(float) * n);
                }
            }
        });
        region.wait();
        Activations squared = p.ffn_v_in;
        if (p.M == 1 && m.skip_zeros) {      // one token: most inputs are zero in a trained model, and need no weights
            int32_t* list = p.nonzero + region.thread * nonzero_room(m.F);
            find_nonzero(squared, l.ffn_v.format, list, list + squared.K);
        }
        const Task out = {&l.ffn_v, &squared};
        products(region, &out, 1, p.M, tile, [&](int, long c, long n) {
            for (long t = 0; t < p.M; t++)
                for (long i = c; i < c + n; i++) p.x[t * m.D + i] += p.receptance[t * m.D + i] * tile[t * unit + i - c];
        });
        region.wait();
    }

    void logits() {
        for (long r = 0; r < p.n_wanted; r++) {
            const float* x = p.x + p.wanted[r] * m.D;
            const Norm s = statistics(x, m.D, norm_eps);
            columns(region, m.D, [&](long c, long n) {
                float y[unit];
                for (long i = 0; i < n; i++) y[i] = normalise(x[c + i], s, m.ln_out_w[c + i], m.ln_out_b[c + i]);
                prepare(p.head_in, r, c, y, n);
            });
        }
        region.wait();
        const Task head = {&m.head, &p.head_in};
        products(region, &head, 1, p.n_wanted, tile, [&](int, long c, long n) {
            for (long r = 0; r < p.n_wanted; r++) memcpy(p.logits + r * m.V + c, tile + r * unit, sizeof(float) * n);
        });
    }
};

void forward(const Model& m, const Pass& p, const Region& region) {
    Worker worker{m, p, region};
    worker.embed();
    for (long l = 0; l < m.L; l++) {
        worker.time_mix(m.layers[l], p.state[l]);
        worker.channel_mix(m.layers[l], p.state[l]);
    }
    if (p.n_wanted) worker.logits();
}

void product(const Product& p, const Region& region) {
    columns(region, p.W.K, [&](long c, long n) {
        for (long t = 0; t < p.M; t++) prepare(p.in, t, c, p.x + t * p.W.K + c, n);
    });
    region.wait();
    const Task task = {&p.W, &p.in};
    float* tile = p.own + region.thread * p.M * unit;
    products(region, &task, 1, p.M, tile, [&](int, long c, long n) {
        for (long t = 0; t < p.M; t++) memcpy(p.out + t * p.W.N + c, tile + t * unit, sizeof(float) * n);
    });
}

}  // namespace
