// The product with weights of four bits:
//
//     out[i, j] = sum over p of x[i, p] * w[j, p]
//     w[j, p]   = (table[code[j, p]] - zero[j, g]) * scale[j, g] (+ shift[j, g]),   g = p / group
//
// with x: [m, k], out: [m, n], codes: [n, ceil(k / 2)] bytes (even columns in the lower half), and
// scale, zero, shift: [n, ceil(k / group)]; shift may be null.
//
// The order of additions is that of dense.rs: fused multiply-adds with p ascending inside blocks of 256, the blocks
// summed in order. Every other step is rounded by itself, so the bits are those of the CPU.

#define TILE 64   // rows and outputs of a thread block
#define STEP 16   // columns in shared memory at a time; divides BLOCK
#define BLOCK 256 // columns that are summed apart
#define EACH 4    // rows and outputs of a thread

extern "C" __global__ void __launch_bounds__(256)
matmul_u4(const float *x, const unsigned char *codes, const float *table, const float *scale, const float *zero,
          const float *shift, float *out, unsigned m, unsigned n, unsigned k, unsigned group)
{
    __shared__ float xs[STEP][TILE];
    __shared__ float ws[STEP][TILE];

    const unsigned thread = threadIdx.x;
    const unsigned row0 = blockIdx.y * TILE, output0 = blockIdx.x * TILE;
    const unsigned r0 = thread / (TILE / EACH) * EACH, c0 = thread % (TILE / EACH) * EACH;
    const unsigned long long bytes = (k + 1ull) / 2, groups = (k + group - 1ull) / group;

    float total[EACH][EACH] = {};
    for (unsigned block = 0; block < k; block += BLOCK) {
        float sum[EACH][EACH] = {};
        for (unsigned p0 = block; p0 < k && p0 < block + BLOCK; p0 += STEP) {
            for (unsigned i = thread; i < STEP * TILE; i += blockDim.x) {
                const unsigned p = p0 + i % STEP, lane = i / STEP;
                const unsigned long long row = row0 + lane, output = output0 + lane;
                xs[i % STEP][lane] = p < k && row < m ? x[row * k + p] : 0.0f;
                float w = 0.0f;
                if (p < k && output < n) {
                    const unsigned char byte = codes[output * bytes + p / 2];
                    const unsigned long long g = output * groups + p / group;
                    w = __fmul_rn(__fsub_rn(table[byte >> 4 * (p & 1) & 15], zero[g]), scale[g]);
                    if (shift)
                        w = __fadd_rn(w, shift[g]);
                }
                ws[i % STEP][lane] = w;
            }
            __syncthreads();
            for (unsigned p = 0; p < STEP; p++)
                for (unsigned r = 0; r < EACH; r++)
                    for (unsigned c = 0; c < EACH; c++)
                        sum[r][c] = __fmaf_rn(xs[p][r0 + r], ws[p][c0 + c], sum[r][c]);
            __syncthreads();
        }
        for (unsigned r = 0; r < EACH; r++)
            for (unsigned c = 0; c < EACH; c++)
                total[r][c] = __fadd_rn(total[r][c], sum[r][c]);
    }
    for (unsigned r = 0; r < EACH; r++)
        for (unsigned c = 0; c < EACH; c++) {
            const unsigned long long row = row0 + r0 + r, output = output0 + c0 + c;
            if (row < m && output < n)
                out[row * n + output] = total[r][c];
        }
}
