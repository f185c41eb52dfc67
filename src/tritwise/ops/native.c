/* The CPU backend's arithmetic: one pass where torch makes a dozen. No headers but C's own; called through ctypes.

   Every result has the same bits as the torch reference (ops/update/reference.py, ops/linear/reference.py,
   registers/random.py): the same float32 operations in the same order, one rounding each, and integers otherwise.
   Build without contraction (no fused multiply-add), with wrapping integers, and never with -ffast-math.

   Matrices are row-major and contiguous. Rows go through local arrays of BLOCK elements, which the compiler turns into
   vector code. Needs a little-endian machine: the low half of a random word serves the element with the even index. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 256                          /* even, so that a block of a flat array starts on a whole random word */
#define ONE 65536.0f                       /* one unit in fixed point: 16 bits of fraction */
#define HALF 32768
#define MOMENTUM_LIMIT 127
#define STEP_LIMIT (2 * MOMENTUM_LIMIT)    /* units a register can be asked to move at once */
#define EXPONENT_FLOOR (-126)
#define EXPONENT_CEILING 120
#define INFINITE 0x7f800000                /* bits of +infinity; above it lie the NaNs */
#define LEAD 81                            /* what one unit of the leading trit is worth */

/* Random bits for one block, seen as words when they are made and as halves when they are used. One word more than
   the block needs: it may start with the high half of a word. */
typedef union {
    uint32_t words[BLOCK / 2 + 1];
    int16_t halves[BLOCK + 2];
} Draws;

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline uint32_t mix(uint32_t index, uint32_t first, uint32_t second)
{
    uint32_t x = index * 0x9E3779B1u + first;
    x ^= x >> 16;
    x *= 0x21F0AAADu;
    x ^= x >> 15;
    x ^= second;
    x *= 0xD35A2D97u;
    return x ^ (x >> 15);
}

/* Fills the draws of `count` elements from flat index `start` on; the first is halves[start & 1]. */
static inline void draw(Draws *draws, int64_t start, int64_t count, uint32_t first, uint32_t second)
{
    uint32_t base = (uint32_t)(start >> 1);
    int32_t words = (int32_t)(((start & 1) + count + 1) >> 1);
    for (int32_t i = 0; i < words; i++)
        draws->words[i] = mix(base + (uint32_t)i, first, second);
}

static inline float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline int32_t bits_of(float value)
{
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float power_of_two(int32_t exponent) { return float_of((uint32_t)(exponent + 127) << 23); }

/* Scaled x to fixed point: rounded half to even, clamped to +-limit units. A NaN passes the clamp; the machine's own
   conversion decides what integer it becomes, as it does in torch. */
static inline int32_t fixed_point(float x, float limit)
{
    x = rintf(x);
    x = x < -limit ? -limit : x;
    x = x > limit ? limit : x;
    return (int32_t)x;
}

/* Bits of the largest |decay * momentum + grad| in a row. Without their sign, floats order as their bits do; a NaN or
   an infinity anywhere gives INFINITE or more. */
static int32_t peak_of_row(const int8_t *restrict momentum, const float *restrict grad, int64_t columns, float old)
{
    int32_t peak = 0;
    for (int64_t i = 0; i < columns; i++) {
        float kept = (float)momentum[i] * old;
        int32_t size = bits_of(kept + grad[i]) & 0x7fffffff;
        peak = size > peak ? size : peak;
    }
    return peak;
}

/* The least e with peak * 2**-e < 127, within its limits: what frexp says of peak / 127. */
static int32_t exponent_of_peak(int32_t peak)
{
    int32_t ratio = bits_of(float_of((uint32_t)peak) / (float)MOMENTUM_LIMIT);
    int32_t exponent = (ratio >> 23) - 126;
    exponent = exponent < EXPONENT_FLOOR ? EXPONENT_FLOOR : exponent; /* zeros and subnormals come out at the floor */
    return exponent > EXPONENT_CEILING ? EXPONENT_CEILING : exponent;
}

static void round_row(int8_t *restrict momentum, const float *restrict grad, int64_t columns, float old, float inverse,
                      int64_t start, uint32_t first, uint32_t second)
{
    Draws draws;
    for (int64_t at = 0; at < columns; at += BLOCK) {
        int32_t count = (int32_t)smaller(BLOCK, columns - at);
        draw(&draws, start + at, count, first, second);
        const int16_t *restrict random = draws.halves + ((start + at) & 1);
        int8_t *restrict m = momentum + at;
        const float *restrict g = grad + at;
        for (int32_t i = 0; i < count; i++) {
            float kept = (float)m[i] * old;
            float value = (kept + g[i]) * inverse;
            int32_t fixed = fixed_point(value * ONE, MOMENTUM_LIMIT * ONE);
            m[i] = (int8_t)((fixed + random[i] + HALF) >> 16);
        }
    }
}

/* Bumped when a signature below changes. */
int32_t tritwise_version(void) { return 3; }

/* momentum int8 [rows, columns] and row_exponent int8 [rows] <- decay * momentum + grad, rounded by (first, second).
   1: taken. 0: not finite, nothing changed. -1: no memory, nothing changed. */
int32_t tritwise_accumulate(int8_t *momentum, int8_t *row_exponent, const float *grad, int64_t rows, int64_t columns,
                            float decay, int32_t first, int32_t second)
{
    int8_t *next = malloc((size_t)rows);
    if (next == NULL)
        return -1;
    for (int64_t row = 0; row < rows; row++) {
        int64_t start = row * columns;
        int32_t peak = peak_of_row(momentum + start, grad + start, columns, power_of_two(row_exponent[row]) * decay);
        if (peak >= INFINITE) {
            free(next);
            return 0;
        }
        next[row] = (int8_t)exponent_of_peak(peak);
    }
    for (int64_t row = 0; row < rows; row++) {
        int64_t start = row * columns;
        round_row(momentum + start, grad + start, columns, power_of_two(row_exponent[row]) * decay,
                  power_of_two(-next[row]), start, (uint32_t)first, (uint32_t)second);
        row_exponent[row] = next[row];
    }
    free(next);
    return 1;
}

/* reg int8 [count] <- clamp(reg + round(factor / 65536 * direction), +-limit). Returns how many leading trits changed.
   factor: -rate * 65536. */
int64_t tritwise_move(int8_t *reg, const float *direction, int64_t count, float factor, int32_t limit, int32_t first,
                      int32_t second)
{
    Draws draws;
    int64_t flips = 0;
    for (int64_t at = 0; at < count; at += BLOCK) {
        int32_t size = (int32_t)smaller(BLOCK, count - at), changed = 0;
        draw(&draws, at, size, (uint32_t)first, (uint32_t)second);
        const int16_t *restrict random = draws.halves;
        int8_t *restrict r = reg + at;
        const float *restrict d = direction + at;
        for (int32_t i = 0; i < size; i++) {
            int32_t before = r[i];
            int32_t after = before + ((fixed_point(d[i] * factor, STEP_LIMIT * ONE) + random[i] + HALF) >> 16);
            after = after < -limit ? -limit : after;
            after = after > limit ? limit : after;
            changed += ((before > 40) - (before < -40)) != ((after > 40) - (after < -40));
            r[i] = (int8_t)after;
        }
        flips += changed;
    }
    return flips;
}

static void decode_row(const int8_t *restrict reg, const int8_t *restrict exponent, const float *restrict scales,
                       float *restrict out, int64_t columns, int64_t group, int32_t lead)
{
    const float inverse = (float)(1.0 / lead);
    for (int64_t at = 0; at < columns; at += group) {
        int64_t count = smaller(group, columns - at);
        float scale = scales[*exponent++ + 128];
        /* round(R / 81) is the leading trit; as in the reference a small negative register gives -0. */
        for (int64_t i = 0; i < count; i++)
            out[at + i] = rintf((float)reg[at + i] * inverse) * scale;
    }
}

/* out float [rows, columns] <- round(reg / lead) * scale. exponent: int8 [rows, groups], groups = ceil(columns / group);
   scales: float [256], the scale of exponent E at E + 128. */
void tritwise_decode(const int8_t *reg, const int8_t *exponent, const float *scales, float *out, int64_t rows,
                     int64_t columns, int64_t group, int32_t lead)
{
    int64_t groups = (columns + group - 1) / group;
    for (int64_t row = 0; row < rows; row++)
        decode_row(reg + row * columns, exponent + row * groups, scales, out + row * columns, columns, group, lead);
}

/* out float [count, columns] <- the decoded rows `ids`. 1: done. 0: an id is not in 0 … rows-1; out is then unfinished. */
int32_t tritwise_gather(const int64_t *ids, const int8_t *reg, const int8_t *exponent, const float *scales, float *out,
                        int64_t count, int64_t rows, int64_t columns, int64_t group, int32_t lead)
{
    int64_t groups = (columns + group - 1) / group;
    for (int64_t n = 0; n < count; n++) {
        int64_t row = ids[n];
        if (row < 0 || row >= rows)
            return 0;
        decode_row(reg + row * columns, exponent + row * groups, scales, out + n * columns, columns, group, lead);
    }
    return 1;
}
