// The kernels of one instruction set. Compiled several times, each with its own flags and
//   MATEXPORT_ISA    the namespace (portable, avx2, avx512)
//   MATEXPORT_TABLE  the name of its table (kPortable, kAvx2, kAvx512)
//   MATEXPORT_LANES  floats in its widest vector
//   MATEXPORT_BF16   1 where the instruction for products in bfloat16 may be asked for at run time
#define MATEXPORT_BF16 (MATEXPORT_LANES == 16)

#include "../causal_conv1d/ort_cpu.h"
#include "../mamba2_scan/ort_cpu.h"
#include "isa.h"

namespace matexport {
namespace MATEXPORT_ISA {
namespace {
#include "vectors.h"

#include "../causal_conv1d/ort_cpu_kernel.h"
#include "../mamba2_scan/ort_cpu_product_kernel.h"
#include "../mamba2_scan/ort_cpu_kernel.h"
#include "../mamba2_scan/ort_cpu_step_kernel.h"
}  // namespace
}  // namespace MATEXPORT_ISA

#define MATEXPORT_TEXT_(x) #x
#define MATEXPORT_TEXT(x) MATEXPORT_TEXT_(x)
extern const Kernels MATEXPORT_TABLE;
const Kernels MATEXPORT_TABLE = {
    MATEXPORT_TEXT(MATEXPORT_ISA), MATEXPORT_ISA::scan_plan, MATEXPORT_ISA::scan_prepare, MATEXPORT_ISA::scan_heads,
    MATEXPORT_ISA::scan_step,      MATEXPORT_ISA::conv_rows, MATEXPORT_ISA::conv_step,
};

}  // namespace matexport
