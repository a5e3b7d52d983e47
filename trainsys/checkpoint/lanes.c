/* SHA-256 (FIPS 180-4) of LANES messages side by side: word i of every message in one vector register.

   A message's blocks depend on each other, so one message cannot use a vector unit; sixteen can. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LANES 16

typedef uint32_t lanes_t __attribute__((vector_size(4 * LANES)));

static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

#define ROTATE(x, n) (((x) >> (n)) | ((x) << (32 - (n))))
#define SUM(x, i, j, k) (ROTATE(x, i) ^ ROTATE(x, j) ^ ROTATE(x, k))
#define STEP(x, i, j, k) (ROTATE(x, i) ^ ROTATE(x, j) ^ ((x) >> (k)))

/* state: [8][LANES]; data: where each message goes on; blocks: how many of 64 bytes of each are taken in. */
void trainsys_sha256_lanes(uint32_t *state, const uint8_t *const *data, size_t blocks)
{
    lanes_t s[8];
    memcpy(s, state, sizeof s);
    for (size_t block = 0; block < blocks; block++) {
        uint32_t turned[16][LANES] __attribute__((aligned(64)));
        for (int lane = 0; lane < LANES; lane++)
            for (int i = 0; i < 16; i++)
                memcpy(&turned[i][lane], data[lane] + 64 * block + 4 * i, 4);
        lanes_t w[16];
        for (int i = 0; i < 16; i++) {
            lanes_t x;
            memcpy(&x, turned[i], sizeof x);
            w[i] = (x << 24) | ((x & 0xff00) << 8) | ((x >> 8) & 0xff00) | (x >> 24);
        }
        lanes_t a = s[0], b = s[1], c = s[2], d = s[3], e = s[4], f = s[5], g = s[6], h = s[7];
#pragma GCC unroll 64
        for (int i = 0; i < 64; i++) {
            if (i >= 16)
                w[i & 15] += STEP(w[(i + 1) & 15], 7, 18, 3) + w[(i + 9) & 15] + STEP(w[(i + 14) & 15], 17, 19, 10);
            lanes_t one = h + SUM(e, 6, 11, 25) + (g ^ (e & (f ^ g))) + K[i] + w[i & 15];
            lanes_t two = SUM(a, 2, 13, 22) + ((a & b) ^ (c & (a ^ b)));
            h = g, g = f, f = e, e = d + one, d = c, c = b, b = a, a = one + two;
        }
        s[0] += a, s[1] += b, s[2] += c, s[3] += d, s[4] += e, s[5] += f, s[6] += g, s[7] += h;
    }
    memcpy(state, s, sizeof s);
}
