// A string that the dispatcher hands to an operator. Tested by tests/test_foreground_ratio.py, through `border`.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstddef>
#include <string>
#include <string_view>

namespace csf {

// Owns the handle. (An operator that takes a std::string leaks memory in every call, in torch's conversion.)
class String {
 public:
  explicit String(StringHandle handle) : handle_(handle) {}
  String(const String&) = delete;
  String& operator=(const String&) = delete;
  ~String() { torch_delete_string(handle_); }

  std::string_view view() const {
    const char* data;
    size_t length;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle_, &data));
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle_, &length));
    return {data, length};
  }

 private:
  StringHandle handle_;
};

// Takes the argument `backend` of an operator. A check in Python comes before, but an exported program may skip it.
inline void check_runs_on_cpu(StringHandle handle) {
  const String backend(handle);
  STD_TORCH_CHECK(backend.view() == "auto" || backend.view() == "cpu",
                  "backend: expected 'auto' or 'cpu' for CPU tensors, got '", std::string(backend.view()), "'");
}

}  // namespace csf
