#include "winograd.h"

#include "simd.h"

namespace bnr::winograd {

namespace {

// The transforms in one dimension, on four values (two, three) that are `step` apart.
BNR_INLINE void input(vf* d, int step) {
    const vf a = d[0], b = d[step], c = d[2 * step], e = d[3 * step];
    d[0] = a - c, d[step] = b + c, d[2 * step] = c - b, d[3 * step] = b - e;
}

BNR_INLINE void output(vf* m, int step) {
    const vf a = m[0], b = m[step], c = m[2 * step], e = m[3 * step];
    m[0] = a + (b + c), m[step] = (b - c) - e;
}

BNR_INLINE void gradient(vf* e, int step) {
    const vf a = e[0], b = e[step];
    e[step] = a + b, e[2 * step] = a - b, e[3 * step] = -b;
}

BNR_INLINE void weight(vf* g, int step) {
    const vf a = g[0], b = g[step], c = g[2 * step], half = set1(0.5f);
    g[step] = half * ((a + c) + b), g[2 * step] = half * ((a + c) - b), g[3 * step] = c;
}

BNR_INLINE void weight_gradient(vf* s, int step) {
    const vf half = set1(0.5f), sum = half * (s[step] + s[2 * step]), difference = half * (s[step] - s[2 * step]);
    s[0] = s[0] + sum, s[step] = difference, s[2 * step] = sum + s[3 * step];
}

}  // namespace

Components::Components(Scratch& scratch, int64_t pixels, int64_t channels)
    : pitch(conv::scratch_pitch(channels)),
      // A line beyond a multiple of 4096 bytes: the 16 that belong together lie in 16 sets of the first-level cache.
      step(conv::round_up(pixels * pitch, 1024) + 16), data(scratch.take<float>(kComponents * step + gemm::kPanel)) {}

void transform_input(const float* const rows[4], int64_t ld, int64_t tiles, int64_t channels, const Components& to, int64_t pixel) {
    for (int64_t t = 0; t < tiles; t++) {
        for (int64_t c = 0; c < channels; c += W) {
            vf d[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) d[i] = load(rows[i / 4] + (2 * t + i % 4) * ld + c);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) input(d + 4 * i, 1);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) input(d + i, 4);
            float* out = to.data + (pixel + t) * to.pitch + c;
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) store(out + i * to.step, d[i]);
        }
    }
}

void transform_gradient(const float* const rows[2], int64_t ld, int64_t tiles, int64_t channels, const Components& to,
                        int64_t pixel) {
    for (int64_t t = 0; t < tiles; t++) {
        for (int64_t c = 0; c < channels; c += W) {
            vf e[16];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) e[i / 2 * 4 + i % 2] = load(rows[i / 2] + (2 * t + i % 2) * ld + c);
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) gradient(e + 4 * i, 1);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) gradient(e + i, 4);
            float* out = to.data + (pixel + t) * to.pitch + c;
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) store(out + i * to.step, e[i]);
        }
    }
}

void transform_output(const Components& from, int64_t pixel, int64_t tiles, int64_t channels, float* const rows[2], int64_t ld) {
    for (int64_t t = 0; t < tiles; t++) {
        for_each_vector(channels, [&](int64_t c, auto lanes) {
            const float* in = from.data + (pixel + t) * from.pitch + c;
            vf m[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) m[i] = load(in + i * from.step, lanes);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) output(m + i, 4);
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) output(m + 4 * i, 1);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) store(rows[i / 2] + (2 * t + i % 2) * ld + c, m[i / 2 * 4 + i % 2], lanes);
        });
    }
}

conv::PackedWeight transform_weight(const Problem& p, const conv::Grouping& g, bool transposed, Scratch& scratch) {
    const int64_t depth = transposed ? g.out : g.in, columns = transposed ? g.in : g.out;
    const int64_t panels = conv::ceil_div(columns, gemm::kPanel);
    const conv::PackedWeight made{scratch.take<gemm::word>(conv::PackedWeight::size(g.groups, kComponents, depth, columns)),
                                  kComponents, depth, panels};
    Scratch inner;
    const conv::PackedWeight taps = conv::pack_weight(
        p, g, transposed, gemm::Words::kFloat, inner.take<gemm::word>(conv::PackedWeight::size(g.groups, 9, depth, columns)));
    const int64_t rows = g.groups * panels * depth, threads = useful_threads(rows * gemm::kPanel * 9, p.threads);
    parallel(threads, [&](int64_t thread) {
        const Range mine = share(rows, 1, thread, threads);
        for (int64_t row = mine.begin; row < mine.end; row++) {
            const int64_t panel = row / depth, k = row % depth;
            for (int64_t n = 0; n < gemm::kPanel; n += W) {
                const float* from = reinterpret_cast<const float*>(taps.panel(0, panel)) + k * gemm::kPanel + n;
                float* to = reinterpret_cast<float*>(made.data + panel * made.panel_pitch()) + k * gemm::kPanel + n;
                vf u[16];
                // The input gradient is a convolution with the kernel turned by 180 degrees.
                for (int i = 0; i < 9; i++) u[i / 3 * 4 + i % 3] = load(from + (transposed ? 8 - i : i) * taps.tap_pitch());
                for (int i = 0; i < 3; i++) weight(u + 4 * i, 1);
                for (int i = 0; i < 4; i++) weight(u + i, 4);
                for (int i = 0; i < 16; i++) store(to + i * made.tap_pitch(), u[i]);
            }
        }
    });
    return made;
}

void transform_weight_gradient(const std::vector<float*>& parts, int64_t outputs, int64_t inputs, int64_t row_pitch, float* to,
                               int64_t to_pitch, int64_t threads) {
    parallel(threads, [&](int64_t thread) {
        const Range mine = share(outputs, 1, thread, threads);
        for (int64_t n = mine.begin; n < mine.end; n++) {
            for_each_vector(inputs, [&](int64_t c, auto lanes) {
                vf s[16];
                for (int i = 0; i < 16; i++) {
                    const int64_t at = (i * outputs + n) * row_pitch + c;
                    s[i] = load(parts[0] + at, lanes);
                    for (std::size_t part = 1; part < parts.size(); part++) s[i] = s[i] + load(parts[part] + at, lanes);
                }
                for (int i = 0; i < 4; i++) weight_gradient(s + i, 4);
                for (int i = 0; i < 3; i++) weight_gradient(s + 4 * i, 1);
                for (int i = 0; i < 9; i++) store(to + n * to_pitch + i * inputs + c, s[i / 3 * 4 + i % 3], lanes);
            });
        }
    });
}

}  // namespace bnr::winograd
