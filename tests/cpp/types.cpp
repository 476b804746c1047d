// Element types at compile time: the dtype of each, and the types that do not compile.
#include <array>
#include <string>
#include <vector>

#include "check.hpp"

using namespace xent;

static_assert(dtype_of<float> == XENT_F32 && dtype_of<double> == XENT_F64);
static_assert(dtype_of<bf16> == XENT_BF16 && dtype_of<f16> == XENT_F16);
static_assert(dtype_of<std::int64_t> == XENT_I64 && dtype_of<long long> == XENT_I64);
static_assert(dtype_of<std::int32_t> == XENT_I32 && dtype_of<std::uint32_t> == XENT_U32);
static_assert(dtype_of<std::uint16_t> == XENT_U16 && dtype_of<std::uint8_t> == XENT_U8 && dtype_of<bool> == XENT_U8);
static_assert(dtype_of<const float> == XENT_F32);
#if defined(__STDCPP_BFLOAT16_T__)
static_assert(dtype_of<std::bfloat16_t> == XENT_BF16);
#endif
#if defined(__STDCPP_FLOAT16_T__)
static_assert(dtype_of<std::float16_t> == XENT_F16);
#endif
static_assert(!is_element<char> && !is_element<signed char> && !is_element<short> && !is_element<std::uint64_t>);
static_assert(!is_element<long double> && !is_element<void> && !is_element<std::string> && !is_element<float*>);
static_assert(is_float_element<float> && is_float_element<bf16> && !is_float_element<int>);
static_assert(is_index_element<std::uint8_t> && is_index_element<std::int64_t> && !is_index_element<double>);

static_assert(std::is_convertible_v<float*, input> && std::is_convertible_v<const float*, input>);
static_assert(std::is_convertible_v<float*, output> && !std::is_convertible_v<const float*, output>);
static_assert(std::is_convertible_v<std::vector<float>&, output> && !std::is_convertible_v<const std::vector<float>&, output>);
static_assert(std::is_convertible_v<const std::vector<int>&, input> && !std::is_convertible_v<std::vector<int>, input>);
static_assert(std::is_convertible_v<std::array<double, 3>&, input> && std::is_convertible_v<std::nullptr_t, input>);
static_assert(!std::is_convertible_v<void*, input> && !std::is_convertible_v<std::string&, input>);
static_assert(!std::is_convertible_v<short*, input> && !std::is_convertible_v<std::vector<bool>&, input>);
static_assert(std::is_trivially_copyable_v<input> && std::is_trivially_copyable_v<output>);

int main() {
    // halves held as plain words, and as themselves: one dtype, one address
    std::uint16_t words[2] = {0x3f80, 0x4000};
    const std::uint16_t* constant = words;
    static_assert(std::is_same_v<decltype(as_bf16(words)), bf16*> && std::is_same_v<decltype(as_bf16(constant)), const bf16*>);
    static_assert(std::is_same_v<decltype(as_f16(words)), f16*> && std::is_same_v<decltype(as_f16(constant)), const f16*>);
    CHECK(input(as_bf16(constant)).view().data == words && input(as_bf16(words)).view().dtype == XENT_BF16);
    CHECK(output(as_f16(words)).view().data == words && input(as_f16(words)).view().dtype == XENT_F16);
    CHECK(input(words).view().dtype == XENT_U16);

    input absent, packed(words), strided(words, strides{5}), null(nullptr);
    CHECK(absent.absent() && null.absent() && !packed.absent());
    CHECK(packed.view().strides[0] == 0 && packed.view().strides[1] == 0 && packed.view().strides[2] == 0);
    CHECK(strided.view().strides[0] == 5 && strided.view().strides[1] == 1 && strided.view().strides[2] == 1);
    CHECK(input(constant).size() == SIZE_MAX && strided.size() == 2 && packed.size() == 2); // an array knows its size
    std::vector<float> three(3);
    CHECK(input(three).size() == 3 && output(three).size() == 3 && output(three).view().data == three.data());

    // targets of each type through the wrapper
    const float logits[] = {0.1f, 0.2f, 0.3f, 0.4f};
    auto loss = [&](auto index) { return forward(logits, 1, 4, &index); };
    CHECK_NEAR(loss(std::int64_t{0}), 1.5425, 5e-5);
    CHECK_NEAR(loss(0LL), 1.5425, 5e-5);
    CHECK_NEAR(loss(std::int32_t{0}), 1.5425, 5e-5);
    CHECK_NEAR(loss(std::uint32_t{0}), 1.5425, 5e-5);
    CHECK_NEAR(loss(std::uint16_t{0}), 1.5425, 5e-5);
    CHECK_NEAR(loss(std::uint8_t{0}), 1.5425, 5e-5);
    CHECK_TEXT(version(), xent_version());
    CHECK_TEXT(isa(), xent_isa());
    CHECK(stack_bytes() == xent_stack_bytes() && stack_bytes() > 0);
    return report();
}
