// Vectors of float32, as wide as the instruction set that this is compiled for: 16 lanes (AVX-512: F, BW, DQ, VL), 8
// (AVX2, FMA) or 4 (NEON of 64-bit Arm). What differs stands in a section a set; all else is written with operators and
// these functions. Sums are added up in the lanes' order, so sets differ by rounding; random numbers never differ.
#pragma once

#ifdef __x86_64__
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

// A loop of its own for the compiler: inlined, loops crowd each other out of the registers and run at half the speed.
#define OWN_LOOP __attribute__((noinline))

namespace kernels {

struct bf16 {
    uint16_t bits;
};

inline long round_up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

constexpr float LOG2_E = 1.44269504088896341f;

#if defined(__AVX512F__)
constexpr int LANES = 16;
using vec = __m512;
using mask = __mmask16;  // a bit a lane
#elif defined(__AVX2__)
constexpr int LANES = 8;
using vec = __m256;
#else
constexpr int LANES = 4;
using vec = float32x4_t;
#endif
typedef uint32_t ints __attribute__((vector_size(4 * LANES)));

alignas(64) constexpr uint32_t NUMBERS[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

#if defined(__AVX512F__)

// The first `count` lanes.
inline mask first_lanes(long count) { return count >= LANES ? 0xFFFF : static_cast<mask>((1u << count) - 1); }
inline bool has_lane(mask lanes, int lane) { return (lanes >> lane) & 1; }
// Lanes of two numbers below 2^16 where the first is the second or more.
inline mask at_least(ints a, ints b) { return _mm512_cmpge_epu32_mask((__m512i)a, (__m512i)b); }
inline mask negative(vec x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ); }
// v in these lanes, and 0 or `other` in the rest.
inline vec only(mask lanes, vec v) { return _mm512_maskz_mov_ps(lanes, v); }
inline vec choose(mask lanes, vec v, vec other) { return _mm512_mask_mov_ps(other, lanes, v); }

inline vec all(float x) { return _mm512_set1_ps(x); }
inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
inline vec fnma(vec a, vec b, vec c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline vec max(vec a, vec b) { return _mm512_max_ps(a, b); }                // b where either is NaN
inline vec absolute(vec x) { return _mm512_abs_ps(x); }
// A reciprocal of 14 bits and one Newton step: 28 bits, in a fraction of a division's time.
inline vec reciprocal(vec x) {
    const vec t = _mm512_rcp14_ps(x);
    return t * fnma(x, t, all(2.0f));
}
inline float greatest_lane(vec v) { return _mm512_reduce_max_ps(v); }
inline float sum_of_lanes(vec v) { return _mm512_reduce_add_ps(v); }

// The whole number nearest to x log2 e, and what `raise` needs to multiply by two to its power.
constexpr float LEAST_EXPONENT = -104.0f;
inline vec nearest_power(vec x, vec& power) { return power = _mm512_roundscale_ps(x * all(LOG2_E), 0); }
inline vec raise(vec y, vec power) { return _mm512_scalef_ps(y, power); }

inline vec load(const float* p) { return _mm512_loadu_ps(p); }
inline vec load(const float* p, long count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
inline void store(float* p, vec v) { _mm512_storeu_ps(p, v); }
inline void store(float* p, vec v, long count) { _mm512_mask_storeu_ps(p, first_lanes(count), v); }

inline vec widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
inline vec load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline vec load(const bf16* p, long count) { return widen(_mm256_maskz_loadu_epi16(first_lanes(count), p)); }

// To bfloat16, ties to even; a NaN stays a NaN.
inline __m256i narrow(vec v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
inline void store(bf16* p, vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
inline void store(bf16* p, vec v, long count) { _mm256_mask_storeu_epi16(p, first_lanes(count), narrow(v)); }

inline void transpose(vec (&v)[LANES]) {
    __m512 t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int h = 0; h < 2; h++) {
            const __m512d low = _mm512_castps_pd(t[i + h]), high = _mm512_castps_pd(t[i + h + 2]);
            v[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            v[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    for (int i = 0; i < 4; i++) {
        const __m512 even = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88), even2 = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x88);
        const __m512 odd = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xDD), odd2 = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xDD);
        t[i] = _mm512_shuffle_f32x4(even, even2, 0x88);
        t[i + 8] = _mm512_shuffle_f32x4(even, even2, 0xDD);
        t[i + 4] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(odd, odd2, 0xDD);
    }
    for (int i = 0; i < 16; i++) v[i] = t[i];
}

#else  // AVX2 and NEON

using mask = ints;  // all bits of a lane
typedef int32_t signed_ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

template <typename Vector>
inline Vector read(const void* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline mask first_lanes(long count) {
    return (mask)(read<signed_ints>(NUMBERS) < static_cast<int32_t>(std::min<long>(count, LANES)));
}
inline bool has_lane(mask lanes, int lane) { return lanes[lane] & 1; }
inline mask at_least(ints a, ints b) { return (mask)((signed_ints)a >= (signed_ints)b); }
inline mask negative(vec x) { return (mask)(x < vec{}); }
inline vec only(mask lanes, vec v) { return (vec)(lanes & (ints)v); }
inline vec absolute(vec x) { return (vec)((ints)x & 0x7FFFFFFFu); }

#ifdef __AVX2__
inline vec choose(mask lanes, vec v, vec other) { return _mm256_blendv_ps(other, v, (vec)lanes); }
inline vec all(float x) { return _mm256_set1_ps(x); }
inline vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
inline vec fnma(vec a, vec b, vec c) { return _mm256_fnmadd_ps(a, b, c); }
inline vec max(vec a, vec b) { return _mm256_max_ps(a, b); }
inline float greatest_lane(vec v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
inline float sum_of_lanes(vec v) {
    __m128 m = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_add_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}
inline void transpose(vec (&v)[LANES]) {
    __m256 t[8];
    for (int i = 0; i < 8; i += 4) {
        for (int h = 0; h < 2; h++) {
            const __m256d low = _mm256_castps_pd(_mm256_unpacklo_ps(v[i + 2 * h], v[i + 2 * h + 1]));
            const __m256d high = _mm256_castps_pd(_mm256_unpackhi_ps(v[i + 2 * h], v[i + 2 * h + 1]));
            t[i + h] = _mm256_castpd_ps(low);
            t[i + h + 2] = _mm256_castpd_ps(high);
        }
    }
    for (int i = 0; i < 4; i++) {
        const int from = i / 2 * 2;
        const __m256d a = _mm256_castps_pd(t[from]), b = _mm256_castps_pd(t[from + 1]);
        const __m256d c = _mm256_castps_pd(t[4 + from]), d = _mm256_castps_pd(t[5 + from]);
        const __m256 low = _mm256_castpd_ps(i % 2 ? _mm256_unpackhi_pd(a, b) : _mm256_unpacklo_pd(a, b));
        const __m256 high = _mm256_castpd_ps(i % 2 ? _mm256_unpackhi_pd(c, d) : _mm256_unpacklo_pd(c, d));
        v[i] = _mm256_permute2f128_ps(low, high, 0x20);
        v[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
    }
}
#else
inline vec choose(mask lanes, vec v, vec other) { return vbslq_f32((uint32x4_t)lanes, v, other); }
inline vec all(float x) { return vdupq_n_f32(x); }
inline vec fma(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
inline vec fnma(vec a, vec b, vec c) { return vfmsq_f32(c, a, b); }
inline vec max(vec a, vec b) { return vmaxq_f32(a, b); }
inline float greatest_lane(vec v) { return vmaxvq_f32(v); }
inline float sum_of_lanes(vec v) { return vaddvq_f32(v); }
inline void transpose(vec (&v)[LANES]) {
    const vec a = vzip1q_f32(v[0], v[2]), b = vzip2q_f32(v[0], v[2]);
    const vec c = vzip1q_f32(v[1], v[3]), d = vzip2q_f32(v[1], v[3]);
    v[0] = vzip1q_f32(a, c);
    v[1] = vzip2q_f32(a, c);
    v[2] = vzip1q_f32(b, d);
    v[3] = vzip2q_f32(b, d);
}
#endif

inline vec reciprocal(vec x) { return all(1.0f) / x; }

// Added to 1.5 * 2^23, a number is rounded to a whole one in its lowest bits; with 127 more, these are the exponent of
// two to its power. Never below 2^-126, which stands for 0.
constexpr float LEAST_EXPONENT = -87.3f, ROUND = 12582912.0f + 127.0f;
inline vec nearest_power(vec x, vec& power) {
    const vec rounded = fma(x, all(LOG2_E), all(ROUND));
    power = (vec)((ints)rounded << 23);
    return rounded - all(ROUND);
}
inline vec raise(vec y, vec power) { return y * power; }

inline vec load(const float* p) { return read<vec>(p); }
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
inline vec load(const bf16* p) { return (vec)(__builtin_convertvector(read<halves>(p), ints) << 16); }
inline void store(bf16* p, vec v) {
    const ints bits = (ints)v, rounded = bits + ((bits >> 16 & 1) + 0x7FFFu);
    const halves narrow = __builtin_convertvector((ints)choose((mask)(v != v), all(__builtin_nanf("")), (vec)rounded) >> 16, halves);
    std::memcpy(p, &narrow, sizeof narrow);
}

template <typename T>
inline vec load(const T* p, long count) {
    T whole[LANES] = {};
    std::copy(p, p + count, whole);
    return load(whole);
}
template <typename T>
inline void store(T* p, vec v, long count) {
    T whole[LANES];
    store(whole, v);
    std::copy(whole, whole + count, p);
}

#endif

// e^x to about 1e-7 of its value for x up to 88: x = n ln 2 + r, a polynomial of r, times 2^n. Far below, 0 or 1e-38.
inline vec exp(vec x) {
    x = max(all(LEAST_EXPONENT), x);  // in this order a NaN stays one
    vec power;
    const vec n = nearest_power(x, power);
    vec r = fnma(n, all(0.693359375f), x);
    r = fnma(n, all(-2.12194440e-4f), r);
    vec y = all(1.9875691500e-4f);
    y = fma(y, r, all(1.3981999507e-3f));
    y = fma(y, r, all(8.3334519073e-3f));
    y = fma(y, r, all(4.1665795894e-2f));
    y = fma(y, r, all(1.6666665459e-1f));
    y = fma(y, r, all(5.0000001201e-1f));
    y = fma(y, r * r, r) + all(1.0f);
    return raise(y, power);
}

// Thirty-two well mixed bits of a number (two rounds of multiply and xor-shift), or of each lane's.
template <typename Bits>
inline Bits mix(Bits x) {
    x ^= x >> 16;
    x *= 0x21F0AAADu;
    x ^= x >> 15;
    x *= 0xD35A2D97u;
    return x ^ (x >> 15);
}

// Which elements dropout keeps: a function of the seed, the stream (a row of what is masked) and the place in it, so
// that a backward draws the forward's mask again, and the same on every processor. Every 32 places share 16 numbers of
// 32 bits, 16 bits a place: the low ones are those of the first 16 places.
struct Keep {
    static constexpr int PLACES = 32, MASKS = PLACES / LANES;
    ints key[MASKS / 2];
    ints threshold;

    // An element is dropped where its 16 bits are less than `threshold`; 0 keeps everything.
    Keep(uint64_t seed, uint64_t stream, uint32_t threshold_) {
        uint32_t k = mix(static_cast<uint32_t>(seed) ^ mix(static_cast<uint32_t>(seed >> 32) + 0x9E3779B9u));
        k = mix(k ^ mix(static_cast<uint32_t>(stream) + 0x85EBCA6Bu));
        k = mix(k ^ mix(static_cast<uint32_t>(stream >> 32) + 0xC2B2AE35u));
        for (int i = 0; i < MASKS / 2; i++) {
            ints lanes;
            std::memcpy(&lanes, NUMBERS + i * LANES, sizeof lanes);
            key[i] = lanes * 0x9E3779B9u + k;
        }
        threshold = ints{} + threshold_;
    }

    // Masks of places 32 * turn to 32 * turn + 31.
    inline void masks(long turn, mask (&kept)[MASKS]) const {
        const uint32_t step = static_cast<uint32_t>(turn) * (16u * 0x9E3779B9u);
        for (int i = 0; i < MASKS / 2; i++) {
            const ints bits = mix(key[i] + step);
            kept[i] = at_least(bits & 0xFFFFu, threshold);
            kept[i + MASKS / 2] = at_least(bits >> 16, threshold);
        }
    }
};

// The masks of a stream as a loop comes to its elements, a vector at a time from the first; all lanes without dropout.
class Masks {
  public:
    explicit Masks(const Keep* keep) : keep_(keep) { std::fill(kept_, kept_ + Keep::MASKS, first_lanes(LANES)); }
    inline mask at(long element) {
        const long vector = element / LANES;
        if (keep_ && vector % Keep::MASKS == 0) keep_->masks(vector / Keep::MASKS, kept_);
        return kept_[vector % Keep::MASKS];
    }

  private:
    const Keep* keep_;
    mask kept_[Keep::MASKS];
};

// Scratch memory on a cache line.
class Scratch {
  public:
    template <typename T>
    T* take(long count) {
        void* p = std::aligned_alloc(64, round_up(count * static_cast<long>(sizeof(T)) + 64, 64));
        if (p == nullptr) throw std::bad_alloc();
        owned_[used_++].reset(p);
        return static_cast<T*>(p);
    }

  private:
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    std::unique_ptr<void, Free> owned_[24];
    int used_ = 0;
};

}  // namespace kernels
