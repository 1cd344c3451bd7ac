// WKV forward in the order of ggml's loop, for wkv_native.py to measure against: time outside, heads inside, one key row
// of the state at a time, the output vector read and stored once per key row. Takes w = exp(log_w), like ggml.
extern "C" void ggml_order(const float* r, const float* k, const float* v, const float* w, const float* u, float* S,
                           float* out, long T, long H, long N) {
    for (long t = 0; t < T; t++)
        for (long h = 0; h < H; h++) {
            const long row = (t * H + h) * N;
            float* __restrict o = out + row;
            for (long j = 0; j < N; j++) o[j] = 0;
            for (long i = 0; i < N; i++) {
                const float ki = k[row + i], ri = r[row + i], wi = w[row + i], ui = u[h * N + i];
                float* __restrict s = S + (h * N + i) * N;
                for (long j = 0; j < N; j++) {
                    const float kv = ki * v[row + j];
                    o[j] += ri * (s[j] + ui * kv);
                    s[j] = s[j] * wi + kv;
                }
            }
        }
}
