// The CPU model behind the C ABI: built tensor by tensor over memory that the caller keeps, then run over packed tokens.
#include "model.h"

#include "common.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace roost {
namespace {

constexpr long most_tokens = 256;            // per pass: more would only need more scratch memory

struct Slot {                                // a tensor of a layer by its name in official checkpoints
    const char* name;
    const float* Layer::*vector;
    Matrix Layer::*matrix;
};
constexpr Slot slots[] = {
    {"ln1.weight", &Layer::ln1_w, nullptr},
    {"ln1.bias", &Layer::ln1_b, nullptr},
    {"ln2.weight", &Layer::ln2_w, nullptr},
    {"ln2.bias", &Layer::ln2_b, nullptr},
    {"att.ln_x.weight", &Layer::lnx_w, nullptr},
    {"att.ln_x.bias", &Layer::lnx_b, nullptr},
    {"att.time_maa_x", &Layer::mix_x, nullptr},
    {"att.time_decay", &Layer::decay, nullptr},
    {"att.time_faaaa", &Layer::bonus, nullptr},
    {"ffn.time_maa_k", &Layer::ffn_mix_k, nullptr},
    {"ffn.time_maa_r", &Layer::ffn_mix_r, nullptr},
    {"ffn.time_mix_k", &Layer::ffn_mix_k, nullptr},
    {"ffn.time_mix_r", &Layer::ffn_mix_r, nullptr},
    {"att.time_maa_w1", nullptr, &Layer::shift1},
    {"att.time_decay_w1", nullptr, &Layer::decay1},
    {"att.time_decay_w2", nullptr, &Layer::decay2},
    {"att.receptance.weight", nullptr, &Layer::r},
    {"att.key.weight", nullptr, &Layer::k},
    {"att.value.weight", nullptr, &Layer::v},
    {"att.gate.weight", nullptr, &Layer::g},
    {"att.output.weight", nullptr, &Layer::o},
    {"ffn.key.weight", nullptr, &Layer::ffn_k},
    {"ffn.receptance.weight", nullptr, &Layer::ffn_r},
    {"ffn.value.weight", nullptr, &Layer::ffn_v},
};
constexpr const char* mixed = "wkvrg";       // att.time_maa_w .. g, att.time_mix_k .. g, att.time_maa_w2.w .. g

struct Handle {
    Model model{};
    std::vector<Layer> layers;
    const Kernels* kernels = nullptr;
    std::mutex busy;                         // the scratch memory belongs to one call at a time
    std::vector<char> scratch;
    long zeros = 0, inputs = 0;              // of ffn.value since the last question
};

const Kernels* choose() {
#if defined(__x86_64__)
    if (isa() == Isa::amx) return &kernels_amx;
    if (isa() == Isa::avx512) return &kernels_avx512;
    if (isa() == Isa::avx2) return &kernels_avx2;
#endif
    return &kernels_scalar;
}

void need(bool good, const std::string& problem) {
    if (!good) throw Error(problem);
}

void check_complete(const Model& m) {
    const auto has = [](const void* p, const char* name) { need(p != nullptr, std::string("the model lacks ") + name); };
    const auto shape = [](const Matrix& W, const char* name, long N, long K) {
        need(W.data != nullptr, std::string("the model lacks ") + name);
        need(W.N == N && W.K == K, std::string(name) + " has another shape than the model");
    };
    for (const float* p : {m.ln0_w, m.ln0_b, m.ln_out_w, m.ln_out_b}) has(p, "a norm");
    has(m.embedding, "emb.weight");
    shape(m.head, "head.weight", m.V, m.D);
    for (long i = 0; i < m.L; i++) {
        const Layer& l = m.layers[i];
        for (const float* p : {l.ln1_w, l.ln1_b, l.ln2_w, l.ln2_b, l.lnx_w, l.lnx_b}) has(p, "a norm of a layer");
        for (const float* p : {l.decay, l.bonus, l.ffn_mix_k, l.ffn_mix_r}) has(p, "a vector of a layer");
        for (int x = m.finch ? 0 : 1; x < (m.gate ? 5 : 4); x++) has(l.mix[x], "a mixing vector");
        if (m.finch) {
            has(l.mix_x, "att.time_maa_x");
            shape(l.shift1, "att.time_maa_w1", 5 * m.shift_rank, m.D);
            for (const Matrix& W : l.shift2) shape(W, "att.time_maa_w2", m.D, m.shift_rank);
            shape(l.decay1, "att.time_decay_w1", m.decay_rank, m.D);
            shape(l.decay2, "att.time_decay_w2", m.A, m.decay_rank);
            const Matrix* floats[] = {&l.shift1, &l.decay1, &l.decay2, &l.shift2[0], &l.shift2[1], &l.shift2[2],
                                      &l.shift2[3], &l.shift2[4]};
            for (const Matrix* W : floats)
                need(inputs_of(W->format) == Inputs::f32, "low-rank matrices must be stored as f32 or w16");
        }
        shape(l.r, "att.receptance", m.A, m.D), shape(l.k, "att.key", m.A, m.D), shape(l.v, "att.value", m.A, m.D);
        if (m.gate) shape(l.g, "att.gate", m.A, m.D);
        const Layer& zero = m.layers[0];     // scratch memory is laid out once for all layers
        const Matrix *ours[] = {&l.r, &l.k, &l.v, &l.g, &l.o, &l.ffn_k, &l.ffn_r, &l.ffn_v},
                     *theirs[] = {&zero.r, &zero.k, &zero.v, &zero.g, &zero.o, &zero.ffn_k, &zero.ffn_r, &zero.ffn_v};
        for (int x = 0; x < 8; x++)
            need(inputs_of(ours[x]->format) == inputs_of(theirs[x]->format), "a role has different formats in two layers");
        shape(l.o, "att.output", m.D, m.A), shape(l.ffn_k, "ffn.key", m.F, m.D);
        shape(l.ffn_r, "ffn.receptance", m.D, m.D), shape(l.ffn_v, "ffn.value", m.D, m.F);
    }
}

// Scratch memory cut from one block; the first run with a null block measures it.
struct Cutter {
    char* base;
    size_t used = 0;
    template <class T> T* take(long count) {
        used = (used + 63) / 64 * 64;
        T* at = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += sizeof(T) * static_cast<size_t>(count);
        return at;
    }
    Activations activations(const Matrix& W, long rows) {
        Activations a{};
        a.kind = W.data ? inputs_of(W.format) : Inputs::f32;
        a.K = round_up(W.K, unit);
        a.values = take<char>(rows * a.K * (a.kind == Inputs::f32 ? 4 : 2));
        if (a.kind == Inputs::s8 || a.kind == Inputs::s16) {
            a.low = take<int8_t>(rows * a.K);
            a.scale = take<float>(rows * a.K / unit);
            a.sum = take<int32_t>(rows * a.K / 32);
        }
        return a;
    }
};

size_t lay_out(const Model& m, Pass& p, long rows, long wanted, int threads, char* base) {
    Cutter cut{base};
    const Layer& l = m.layers[0];            // formats are the same in every layer
    const long most = rows > wanted ? rows : wanted;
    p.x = cut.take<float>(rows * m.D), p.normed = cut.take<float>(rows * m.D);
    p.receptance = cut.take<float>(rows * m.D);
    p.r = cut.take<float>(rows * m.A), p.k = cut.take<float>(rows * m.A), p.v = cut.take<float>(rows * m.A);
    p.g = cut.take<float>(rows * m.A);
    p.low = cut.take<float>(rows * 5 * m.shift_rank), p.decay_low = cut.take<float>(rows * m.decay_rank);
    const Matrix* inputs[5] = {&l.decay1, &l.k, &l.v, &l.r, &l.g};
    for (int i = 0; i < 5; i++) p.in[i] = cut.activations(*inputs[i], rows);
    p.shift_in = cut.activations(l.shift1, rows), p.out_in = cut.activations(l.o, rows);
    p.ffn_k_in = cut.activations(l.ffn_k, rows), p.ffn_r_in = cut.activations(l.ffn_r, rows);
    p.ffn_v_in = cut.activations(l.ffn_v, rows), p.head_in = cut.activations(m.head, wanted);
    p.own = cut.take<float>(2 * unit * most * threads);
    p.own_stride = 2 * unit * most;
    p.nonzero = cut.take<int32_t>(nonzero_room(m.F) * threads);
    p.zeros = cut.take<long>(8 * threads);
    return cut.used + 64;
}

void run_pass(Handle& h, Pass& p, int threads) {
    const size_t size = lay_out(h.model, p, p.M, p.n_wanted, threads, nullptr);
    if (h.scratch.size() < size) h.scratch = std::vector<char>(size);
    void* base = h.scratch.data();
    size_t room = h.scratch.size();
    lay_out(h.model, p, p.M, p.n_wanted, threads, static_cast<char*>(std::align(64, 1, base, room)));
    std::memset(p.zeros, 0, sizeof(long) * 8 * static_cast<size_t>(threads));
    parallel(threads, [&](const Region& region) { h.kernels->forward(h.model, p, region); });
    for (int i = 0; i < threads; i++) h.zeros += p.zeros[8 * i];
    h.inputs += p.M * h.model.L * h.model.F;
}

struct Call {
    long n;
    const long* offsets;
    const int32_t* tokens;
    const float* embeddings;
    LayerState* state;
    int last_only;
    float* logits;
    int threads;
};

// Passes of at most `most_tokens`; a sequence is cut wherever a pass is full, and goes on from the state just written.
void run_all(Handle& h, const Call& call) {
    const Model& m = h.model;
    const size_t L = static_cast<size_t>(m.L), shift = sizeof(float) * static_cast<size_t>(call.n * m.D),
                 matrix = sizeof(float) * static_cast<size_t>(call.n * m.A * m.N);
    std::vector<LayerState> state(call.state, call.state + L), here(L);
    if (call.offsets[call.n] > most_tokens)  // several passes work in place
        for (LayerState& l : state) {
            std::memmove(l.att_out, l.att, shift), std::memmove(l.ffn_out, l.ffn, shift);
            std::memmove(l.wkv_out, l.wkv, matrix);
            l.att = l.att_out, l.wkv = l.wkv_out, l.ffn = l.ffn_out;
        }
    std::vector<long> offsets, wanted;
    long s = 0, t = 0;
    float* logits = call.logits;
    do {
        const long first = s, start = t;
        offsets.assign(1, 0), wanted.clear();
        while (s < call.n) {
            const long left = call.offsets[s + 1] - t, room = most_tokens - (t - start);
            const bool whole = left <= room;
            t += whole ? left : room;
            offsets.push_back(t - start);
            if (whole && left > 0 && call.last_only) wanted.push_back(t - 1 - start);
            if (!whole) break;
            s++;
        }
        if (!call.last_only)
            for (long i = 0; i < t - start; i++) wanted.push_back(i);
        for (size_t l = 0; l < L; l++) {
            const LayerState& x = state[l];
            const long row = first * m.D, head = first * m.A * m.N;
            here[l] = {x.att + row, x.wkv + head, x.ffn + row, x.att_out + row, x.wkv_out + head, x.ffn_out + row};
        }
        Pass p{};
        p.M = t - start, p.n = static_cast<long>(offsets.size()) - 1, p.offsets = offsets.data();
        p.tokens = call.tokens ? call.tokens + start : nullptr;
        p.embeddings = call.embeddings ? call.embeddings + start * m.D : nullptr;
        p.state = here.data();
        p.wanted = wanted.data(), p.n_wanted = static_cast<long>(wanted.size()), p.logits = logits;
        logits += p.n_wanted * m.V;
        run_pass(h, p, call.threads);
    } while (s < call.n);
}

void set_matrix(Matrix& W, int format, long N, long K, const void* data, long bytes, const char* name) {
    need(format >= 0 && format <= static_cast<int>(Format::i4), std::string(name) + ": unknown format");
    need(N > 0 && K > 0 && N < (1l << 31) && K < (1l << 31), std::string(name) + ": impossible shape");
    W = {static_cast<Format>(format), N, K, static_cast<const uint8_t*>(data)};
    need(bytes == W.panels() * panel_bytes(W.format, K), std::string(name) + ": the packed matrix has another size");
}

}  // namespace
}  // namespace roost

using namespace roost;

// sizes: is it Finch, has it a gate, layers, width, width of time mixing, width of channel mixing, vocabulary, head size,
// ranks of the token shift and of the decay (0 in Eagle), skip zeros. Null with an error set when they are impossible.
ROOST_API void* roost_model_new(const long* sizes, float group_norm_eps) {
    Handle* made = nullptr;
    guarded([&] {
        auto h = std::make_unique<Handle>();
        Model& m = h->model;
        m.finch = sizes[0] != 0, m.gate = sizes[1] != 0;
        m.L = sizes[2], m.D = sizes[3], m.A = sizes[4], m.F = sizes[5], m.V = sizes[6], m.N = sizes[7];
        m.shift_rank = sizes[8], m.decay_rank = sizes[9], m.skip_zeros = sizes[10] != 0, m.group_norm_eps = group_norm_eps;
        for (int i = 2; i < 8; i++) need(sizes[i] > 0 && sizes[i] < (1l << 31), "the sizes of the model are impossible");
        need(sizes[8] >= 0 && sizes[8] < 65536 && sizes[9] >= 0 && sizes[9] < 65536, "the ranks are impossible");
        need((m.N == 16 || m.N == 32 || m.N == 64) && m.A % m.N == 0, "the native model needs heads of 16, 32 or 64 channels");
        h->layers.resize(static_cast<size_t>(m.L));
        m.layers = h->layers.data();
        h->kernels = choose();
        made = h.release();
    });
    return made;
}

ROOST_API void roost_model_free(void* model) { delete static_cast<Handle*>(model); }

// Names one tensor: of layer `layer`, or of the model for -1. Vectors are fp32 with format -1; the embedding too, with
// format 0 (fp32) or 2 (bf16). The memory stays the caller's and must outlive the model.
ROOST_API int roost_model_set(void* model, long layer, const char* name, int format, long N, long K, const void* data,
                              long bytes) {
    return guarded([&] {
        Model& m = static_cast<Handle*>(model)->model;
        const std::string wanted = name;
        if (layer < 0) {
            const float* vector = static_cast<const float*>(data);
            if (wanted == "blocks.0.ln0.weight") m.ln0_w = vector;
            else if (wanted == "blocks.0.ln0.bias") m.ln0_b = vector;
            else if (wanted == "ln_out.weight") m.ln_out_w = vector;
            else if (wanted == "ln_out.bias") m.ln_out_b = vector;
            else if (wanted == "head.weight") return set_matrix(m.head, format, N, K, data, bytes, name);
            else if (wanted == "emb.weight") {
                need(bytes == m.V * m.D * (format == 0 ? 4 : 2), "emb.weight has another size than the model");
                m.embedding = data, m.embedding_bf16 = format != 0;
                return;
            } else throw Error("no tensor is called " + wanted);
            need(bytes == 4 * m.D, wanted + " has another size than the model");
            return;
        }
        need(layer < m.L, "layer " + std::to_string(layer) + " does not exist");
        Layer& l = m.layers[layer];
        for (const Slot& slot : slots) {
            if (wanted != slot.name) continue;
            if (slot.matrix) return set_matrix(l.*slot.matrix, format, N, K, data, bytes, name);
            const bool wide = wanted.starts_with("att.ln_x") || wanted == "att.time_decay" || wanted == "att.time_faaaa";
            need(bytes == 4 * (wide ? m.A : m.D), wanted + " has another size than the model");
            l.*slot.vector = static_cast<const float*>(data);
            return;
        }
        const size_t letter = wanted.empty() ? std::string::npos : std::string(mixed).find(wanted.back());
        const std::string stem = wanted.substr(0, wanted.size() - (letter == std::string::npos ? 0 : 1));
        if (letter != std::string::npos && (stem == "att.time_maa_" || stem == "att.time_mix_")) {
            need(bytes == 4 * m.D, wanted + " has another size than the model");
            l.mix[letter] = static_cast<const float*>(data);
        } else if (letter != std::string::npos && stem == "att.time_maa_w2.") {
            set_matrix(l.shift2[letter], format, N, K, data, bytes, name);
        } else {
            throw Error("no tensor is called " + wanted);
        }
    });
}

// -1 unless every tensor of the model was set, in shapes and formats that fit together.
ROOST_API int roost_model_ready(void* model) {
    return guarded([&] { check_complete(static_cast<Handle*>(model)->model); });
}

// Reads offsets[n] tokens (or embeddings) of n sequences. state: 6 pointers for each layer, as in LayerState; out may be
// the memory of in. logits: one row for each token, or with last_only one for each sequence that has tokens.
ROOST_API int roost_model_forward(void* model, long n, const long* offsets, const int32_t* tokens, const float* embeddings,
                                  void** state, int last_only, float* logits, int threads) {
    return guarded([&] {
        Handle& h = *static_cast<Handle*>(model);
        check_threads(threads);              // scratch memory is cut for as many
        if (tokens)
            for (long i = 0; i < offsets[n]; i++)
                need(tokens[i] >= 0 && tokens[i] < h.model.V, "token id " + std::to_string(tokens[i]) + " is outside 0.." +
                                                                   std::to_string(h.model.V - 1));
        std::lock_guard busy(h.busy);
        run_all(h, {n, offsets, tokens, embeddings, reinterpret_cast<LayerState*>(state), last_only, logits, threads});
    });
}

// How many inputs of ffn.value were zero, and how many there were, since the last call.
ROOST_API void roost_model_zeros(void* model, long* zeros, long* inputs) {
    Handle& h = *static_cast<Handle*>(model);
    std::lock_guard busy(h.busy);
    *zeros = h.zeros, *inputs = h.inputs;
    h.zeros = h.inputs = 0;
}

// out (M, N) = x (M, K) W^T with one packed matrix, exactly as the model computes it: for tests and measurements.
ROOST_API int roost_product(int format, const void* packed, long bytes, long N, long K, const float* x, long M, float* out,
                            int threads) {
    return guarded([&] {
        Product p{};
        set_matrix(p.W, format, N, K, packed, bytes, "product");
        check_threads(threads);
        need(M > 0 && M < (1l << 31), "product: impossible sizes");
        Cutter measure{nullptr};
        measure.activations(p.W, M), measure.take<float>(M * unit * threads);
        std::vector<char> scratch(measure.used + 64);
        void* base = scratch.data();
        size_t room = scratch.size();
        Cutter cut{static_cast<char*>(std::align(64, 1, base, room))};
        p.in = cut.activations(p.W, M), p.own = cut.take<float>(M * unit * threads);
        p.x = x, p.M = M, p.out = out;
        const Kernels* kernels = choose();
        parallel(threads, [&](const Region& region) { kernels->product(p, region); });
    });
}
