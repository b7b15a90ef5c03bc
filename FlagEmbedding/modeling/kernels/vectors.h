// Sixteen lanes of float32: loads and stores from float32 and bfloat16, exp, random bits. AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace kernels {

constexpr int LANES = 16;

struct bf16 {
    uint16_t bits;
};

inline long round_up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

// The first `count` lanes.
inline __mmask16 first_lanes(long count) { return count >= LANES ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1); }

inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load(const float* p, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, p); }
inline void store(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
inline void store(float* p, __m512 v, __mmask16 lanes) { _mm512_mask_storeu_ps(p, lanes, v); }

inline __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }

// To bfloat16, ties to even; a NaN stays a NaN.
inline __m256i narrow(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

inline __m512 load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline __m512 load(const bf16* p, __mmask16 lanes) { return widen(_mm256_maskz_loadu_epi16(lanes, p)); }
inline void store(bf16* p, __m512 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
inline void store(bf16* p, __m512 v, __mmask16 lanes) { _mm256_mask_storeu_epi16(p, lanes, narrow(v)); }

// e^x to about 1e-7 of its value; 0 below -103, infinity above 88.7: x = n ln 2 + r, a polynomial of r, times 2^n.
inline __m512 exp(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);  // in this order a NaN stays one
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999507e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519073e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795894e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665459e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.0000001201e-1f));
    y = _mm512_add_ps(_mm512_fmadd_ps(y, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, n);
}

// Thirty-two well mixed bits of a number (two rounds of multiply and xor-shift).
inline uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x21F0AAADu;
    x ^= x >> 15;
    x *= 0xD35A2D97u;
    return x ^ (x >> 15);
}

inline __m512i mix(__m512i x) {
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
    x = _mm512_mullo_epi32(x, _mm512_set1_epi32(0x21F0AAAD));
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
    x = _mm512_mullo_epi32(x, _mm512_set1_epi32(static_cast<int>(0xD35A2D97u)));
    return _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
}

// Which elements dropout keeps: a function of the seed, the stream (a row of what is masked) and the place in it, so
// that a backward draws the forward's mask again. Every 32 places share 16 numbers of 32 bits, 16 bits a place.
struct Keep {
    __m512i key;
    __m512i threshold;

    // An element is dropped where its 16 bits are less than `threshold`; 0 keeps everything.
    Keep(uint64_t seed, uint64_t stream, uint32_t threshold_) {
        uint32_t k = mix(static_cast<uint32_t>(seed) ^ mix(static_cast<uint32_t>(seed >> 32) + 0x9E3779B9u));
        k = mix(k ^ mix(static_cast<uint32_t>(stream) + 0x85EBCA6Bu));
        k = mix(k ^ mix(static_cast<uint32_t>(stream >> 32) + 0xC2B2AE35u));
        const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        key = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(k)),
                               _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(0x9E3779B9u))));
        threshold = _mm512_set1_epi32(static_cast<int>(threshold_));
    }

    // Masks of places 32 * pair to 32 * pair + 15, and of the 16 after them.
    inline void masks(uint32_t pair, __mmask16& even, __mmask16& odd) const {
        const uint32_t step = pair * (16u * 0x9E3779B9u);
        const __m512i bits = mix(_mm512_add_epi32(key, _mm512_set1_epi32(static_cast<int>(step))));
        even = _mm512_cmpge_epu32_mask(_mm512_and_si512(bits, _mm512_set1_epi32(0xFFFF)), threshold);
        odd = _mm512_cmpge_epu32_mask(_mm512_srli_epi32(bits, 16), threshold);
    }
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
