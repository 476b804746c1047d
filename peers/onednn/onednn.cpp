// oneDNN: log-softmax forward, gather by hand; log-softmax backward from the loss's gradient, which
// is -1/rows at the targets.
#include "../c/serve.h"
#include <dnnl.hpp>
#include <memory>
#include <string>
#include <unordered_map>

namespace {

using namespace dnnl;

struct state {
  size_t rows = 0, classes = 0;
  bool bf16 = false;
  engine cpu{engine::kind::cpu, 0};
  stream queue{cpu};
  memory x, y, grad_y, grad_x;
  softmax_forward forward;
  softmax_backward backward;
};

std::unique_ptr<state> now;

void put(void *to, bool bf16, size_t at, float value) {
  if (bf16)
    static_cast<uint16_t *>(to)[at] = bf16_of(value);
  else
    static_cast<float *>(to)[at] = value;
}

const char *change(const task *t) {
  if (t->kind == IN_PLACE) return "nothing in place";
  static std::string why;
  try {
    if (now && now->rows == t->rows && now->classes == t->classes && now->bf16 == (t->bf16 != 0))
      return nullptr;
    now = std::make_unique<state>();
    state &s = *now;
    s.rows = t->rows, s.classes = t->classes, s.bf16 = t->bf16 != 0;
    const auto dtype = t->bf16 ? memory::data_type::bf16 : memory::data_type::f32;
    const memory::desc desc({(memory::dim)t->rows, (memory::dim)t->classes}, dtype,
                            memory::format_tag::ab);
    s.x = memory(desc, s.cpu, t->logits);
    s.y = memory(desc, s.cpu), s.grad_y = memory(desc, s.cpu);
    s.grad_x = memory(desc, s.cpu, t->grad);
    const softmax_forward::primitive_desc forward(
        s.cpu, prop_kind::forward_training, algorithm::softmax_log, desc, desc, 1);
    s.forward = softmax_forward(forward);
    s.backward = softmax_backward(softmax_backward::primitive_desc(
        s.cpu, algorithm::softmax_log, desc, desc, desc, 1, forward));
    void *grad_y = s.grad_y.get_data_handle();
    memset(grad_y, 0, t->rows * t->classes * (t->bf16 ? 2 : 4));
    for (size_t i = 0; i < t->rows; i++)
      put(grad_y, s.bf16, i * t->classes + t->targets[i], -1.0f / (float)t->rows);
  } catch (const dnnl::error &e) {
    now.reset();
    why = e.what();
    return why.c_str();
  }
  return nullptr;
}

double run(const task *t) {
  state &s = *now;
  s.forward.execute(s.queue, {{DNNL_ARG_SRC, s.x}, {DNNL_ARG_DST, s.y}});
  s.queue.wait();
  const void *y = s.y.get_data_handle();
  double loss = 0;
  for (size_t i = 0; i < t->rows; i++) {
    const size_t at = i * t->classes + t->targets[i];
    loss -= s.bf16 ? bf16_to(static_cast<const uint16_t *>(y)[at]) : static_cast<const float *>(y)[at];
  }
  if (t->kind == BOTH) {
    s.backward.execute(s.queue, {{DNNL_ARG_DST, s.y},
                                 {DNNL_ARG_DIFF_DST, s.grad_y},
                                 {DNNL_ARG_DIFF_SRC, s.grad_x}});
    s.queue.wait();
  }
  return loss / (double)t->rows;
}

} // namespace

int main() {
  const dnnl_version_t *v = dnnl_version();
  char version[64];
  snprintf(version, sizeof version, "%d.%d.%d", v->major, v->minor, v->patch);
  return serve(version, change, run);
}
