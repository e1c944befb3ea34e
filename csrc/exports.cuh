// How a module exports its functions. TVM FFI's own macro writes an error message of its own into the code for every
// argument of every function, which took longer to compile than all kernels together (7 of 21 s). Here there is one a
// type of argument.
#pragma once

#include <tvm/ffi/any.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include <optional>
#include <tuple>
#include <utility>

namespace fi_prefetch {

/// An argument as a T, or a TypeError that names it by its number, from 0 on.
template <typename T>
[[gnu::noinline]] T argument(tvm::ffi::AnyView passed, int number) {
  std::optional<T> value = passed.try_cast<T>();
  if (!value.has_value()) {
    TVM_FFI_THROW(TypeError) << "argument " << number << ": expected " << tvm::ffi::TypeTraits<T>::TypeStr() << ", got "
                             << passed.GetTypeKey();
  }
  return *std::move(value);
}

/// FUNCTION, with arguments that may be of any type.
template <auto FUNCTION>
struct Exported;

template <typename R, typename... Args, R (*FUNCTION)(Args...)>
struct Exported<FUNCTION> {
  template <typename>
  using Passed = tvm::ffi::AnyView;

  static R call(Passed<Args>... passed) {
    int number = 0;
    return std::apply(FUNCTION, std::tuple<Args...>{argument<Args>(passed, number++)...});
  }
};

}  // namespace fi_prefetch

#define FI_PREFETCH_EXPORT(name, function) TVM_FFI_DLL_EXPORT_TYPED_FUNC(name, fi_prefetch::Exported<function>::call)
