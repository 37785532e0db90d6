// The one symbol of the library: called by SessionOptions.register_custom_ops_library.
#include <atomic>

#include "../causal_conv1d/ort_cpu.h"
#include "../mamba2_scan/ort_cpu.h"
#include "cuda_ort.h"
#include "ort_abi.h"

namespace matexport {
namespace {

constexpr char kDomain[] = "ai.matexport";

// The domain, made once for each ONNX Runtime in the process (there is normally one). Sessions refer to it, so it is
// never freed. ONNX Runtime takes a domain once a session, so the library for CUDA has the ops for the CPU too.
ort::Status domain_of(const ort::ApiBase *base, ort::Api api, void **domain) {
  static std::atomic_flag busy = ATOMIC_FLAG_INIT;
  static const ort::ApiBase *made_for = nullptr;
  static void *made = nullptr;
  static const ort::CustomOp *const ops[] = {mamba2_scan_op(), causal_conv1d_op()};
  while (busy.test_and_set()) {
  }
  ort::Status s = nullptr;
  if (made_for != base) {
    void *fresh = nullptr;
    s = api.create_domain(kDomain, &fresh);
    for (const ort::CustomOp *op : ops)
      if (!s) s = api.add_op(fresh, op);
#ifdef MATEXPORT_CUDA
    for (const ort::CustomOp &op : kCudaOpTable)
      if (!s) s = api.add_op(fresh, &op);
#endif
    if (!s) made = fresh, made_for = base;
  }
  *domain = made;
  busy.clear();
  return s;
}

}  // namespace
}  // namespace matexport

MATEXPORT_EXPORT matexport::ort::Status RegisterCustomOps(void *options, const matexport::ort::ApiBase *base) {
  using matexport::ort::Api;
  const Api api(base->get_api(matexport::ort::kApiVersion));
  if (!api) {
    const Api oldest(base->get_api(1));  // CreateStatus exists since API 1
    return oldest ? oldest.error(matexport::ort::kInvalidArgument,
                                 "matexport's custom ops need ONNX Runtime 1.17 or newer")
                  : nullptr;
  }
  void *domain = nullptr;
  if (matexport::ort::Status s = matexport::domain_of(base, api, &domain)) return s;
  return api.add_domain(options, domain);
}
