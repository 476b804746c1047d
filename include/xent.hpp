// xent.hpp - softmax cross-entropy for C++ trainers. Header-only, C++17, over xent.h.
//
//     #include <xent.hpp>
//
//     std::vector<float> logits = model(batch);              // [rows, classes]
//     std::vector<std::int64_t> targets = labels(batch);     // [rows]
//     std::vector<float> grad(logits.size());                // or the logits themselves: in place
//
//     xent::options options;                                 // the defaults are PyTorch's
//     options.label_smoothing = 0.1;
//     double loss = xent::forward_backward(logits, classes, targets, grad, options);
//
// The loss and its gradients:
//
//     forward            the loss
//     backward           d loss / d logits, from the log-sum-exp of each row that a forward stored
//     forward_backward   both, reading the logits from memory once
//     backward_targets   d loss / d targets, where these are probabilities
//     evaluate           what there is without targets: lse, argmax, entropy, top classes
//
// softmax and log_softmax by themselves, and softmax_backward, log_softmax_backward. partial_forward,
// partial_merge, partial_finish and partial_backward where a vocabulary lies in shards. forward, evaluate,
// backward and forward_backward of an xent::linear, a layer whose logits are never stored. Each call in
// several forms:
//
//     (logits, classes, targets, ...)         containers: vectors, arrays, spans; matrices. Every size is
//                                             checked
//     (logits, rows, classes, targets, ...)   pointers to packed memory
//                                             ... or views, where strides or other layouts are wanted
//     (..., results{...}, ...)                more than the loss: row losses, lse, counts, predictions
//
// Shapes     Logits and their gradient are [rows, classes], row by row unless a view carries strides;
//            everything that belongs to a row is [rows], what belongs to a class is [classes]. With
//            options.inner = K they are [rows, classes, K] and [rows, K], as in segmentation.
// Containers Contiguous ranges: std::vector, std::array, arrays, std::span and the like.
// Matrices   Whatever has rows(), cols(), data() and strides: rowStride() and colStride() (Eigen), or
//            row_stride() and col_stride(), or stride(0) and stride(1); and std::mdspan of rank 1 to 3.
//            Row-major, column-major, a block, a map or a transpose: the strides are the matrix's own,
//            and its shape is checked. An axis of size 1 does not count, so that a row vector and a
//            column vector are both [classes] or [rows]. A vector of all elements is packed memory. A
//            container that is neither a contiguous range nor such a matrix does not compile.
// Types      Deduced from the element: float, double, xent::bf16, xent::f16 for logits, and every class
//            of two bytes that std::numeric_limits describes as one of these halves: std::bfloat16_t,
//            std::float16_t, Eigen::bfloat16, Eigen::half. A gradient has the type of the logits, or
//            float if they are halves.
// Targets    std::int64_t, std::int32_t, std::uint32_t, std::uint16_t, std::uint8_t are class indices,
//            [rows]; a floating type, any of those above, means probabilities, as many as logits.
// Errors     Every failure throws xent::error, with the status and a message that names the operand,
//            the index and the value: "targets[17] = 50257 is outside [0, 50257)". Nothing has then been
//            written: not one byte of a gradient, a result or, in place, the logits.
//            Shared objects with hidden visibility throw it to each other. With libc++, a program that opens
//            them with RTLD_LOCAL is linked with -rdynamic, or does not catch it as what it is.
//            Without exceptions (-fno-exceptions, or XENT_NO_EXCEPTIONS defined before the header) a
//            failing call prints this message to stderr and aborts. A program without exceptions that
//            goes on after an error calls xent.h, which returns a status. Units of both kinds fit in
//            one program.
// Memory     Nothing is owned or kept: pointers need to be valid during the call alone, except that an
//            options object holds on to the operands and the pool put into it. The wrapper allocates
//            only to throw.
// Threads    Any number of threads may call at once, on one pool too; their outputs must be apart. The
//            result does not depend on the number of threads, to the bit.
//
// xent.h says what is computed, with every edge; this header adds no arithmetic of its own.

#ifndef XENT_HPP
#define XENT_HPP

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#if defined(__has_include)
#if __has_include(<version>)
#include <version>
#endif
#endif
#if defined(__cpp_lib_ranges)
#include <ranges>
#endif
#if defined(__cpp_lib_span)
#include <span>
#endif
#if defined(__STDCPP_BFLOAT16_T__) || defined(__STDCPP_FLOAT16_T__)
#include <stdfloat>
#endif

#include "xent.h"

#if !defined(XENT_NO_EXCEPTIONS) && !defined(__cpp_exceptions) && !defined(__EXCEPTIONS) && !defined(_CPPUNWIND)
#define XENT_NO_EXCEPTIONS 1
#endif

// An exception is caught by its type, which every shared object of a program has to share.
#if defined(__GNUC__)
#define XENT_HPP_VISIBLE __attribute__((visibility("default")))
#else
#define XENT_HPP_VISIBLE
#endif

namespace xent {
#if defined(XENT_NO_EXCEPTIONS)
// A namespace of their own keeps functions that abort apart from those that throw, where one program
// has both.
inline namespace without_exceptions {
#endif

// ---- errors ---------------------------------------------------------------------------------

/// What every failing call throws. what() says which operand, which index, which value.
class XENT_HPP_VISIBLE error : public std::runtime_error {
public:
    error(xent_status status, const std::string& message) : std::runtime_error(message), status_(status) {}

    /// XENT_ERR_TARGET and the like.
    xent_status status() const noexcept { return status_; }
    /// "XENT_ERR_TARGET" and the like.
    const char* name() const noexcept { return xent_status_name(status_); }

private:
    xent_status status_;
};

namespace detail {

[[noreturn]] inline void fail(xent_status status, const std::string& message) {
#if defined(XENT_NO_EXCEPTIONS)
    std::fprintf(stderr, "xent: %s: %s\n", xent_status_name(status), message.c_str());
    std::abort();
#else
    throw error(status, message);
#endif
}

} // namespace detail

// ---- element types --------------------------------------------------------------------------

/// The bits of a bfloat16. A type of its own, since std::uint16_t means class indices.
struct bf16 {
    std::uint16_t bits;
};

/// The bits of an IEEE half.
struct f16 {
    std::uint16_t bits;
};

static_assert(sizeof(bf16) == 2 && sizeof(f16) == 2, "an array of halves is an array of their bits");

/// Half-precision memory that is held as plain 16-bit words, or as another library's half.
template <class Type>
const bf16* as_bf16(const Type* data) noexcept {
    static_assert(sizeof(Type) == sizeof(bf16), "a bfloat16 has two bytes");
    return reinterpret_cast<const bf16*>(data);
}
template <class Type, class = std::enable_if_t<!std::is_const_v<Type>>>
bf16* as_bf16(Type* data) noexcept {
    static_assert(sizeof(Type) == sizeof(bf16), "a bfloat16 has two bytes");
    return reinterpret_cast<bf16*>(data);
}
template <class Type>
const f16* as_f16(const Type* data) noexcept {
    static_assert(sizeof(Type) == sizeof(f16), "a half has two bytes");
    return reinterpret_cast<const f16*>(data);
}
template <class Type, class = std::enable_if_t<!std::is_const_v<Type>>>
f16* as_f16(Type* data) noexcept {
    static_assert(sizeof(Type) == sizeof(f16), "a half has two bytes");
    return reinterpret_cast<f16*>(data);
}

namespace detail {

inline constexpr xent_dtype no_dtype = 0xffffffffu;

// Whether a type is a class of two bytes, such as Eigen::half. numeric_limits tells which half.
template <class Type, class = void>
inline constexpr bool is_two_byte_class = false;
template <class Type>
inline constexpr bool is_two_byte_class<Type, std::enable_if_t<std::is_class_v<Type> && !std::is_abstract_v<Type> &&
                                                               sizeof(Type) == 2 && alignof(Type) == 2>> = true;

template <class Type>
constexpr xent_dtype find_dtype() {
    if constexpr (std::is_same_v<Type, float>) return XENT_F32;
    else if constexpr (std::is_same_v<Type, double>) return XENT_F64;
    else if constexpr (std::is_same_v<Type, bf16>) return XENT_BF16;
    else if constexpr (std::is_same_v<Type, f16>) return XENT_F16;
#if defined(__STDCPP_BFLOAT16_T__)
    else if constexpr (std::is_same_v<Type, std::bfloat16_t>) return XENT_BF16;
#endif
#if defined(__STDCPP_FLOAT16_T__)
    else if constexpr (std::is_same_v<Type, std::float16_t>) return XENT_F16;
#endif
    // long and long long are both 64 bits somewhere, and only one of them is std::int64_t
    else if constexpr (std::is_same_v<Type, long> || std::is_same_v<Type, long long> || std::is_same_v<Type, int>)
        return sizeof(Type) == 8 ? XENT_I64 : sizeof(Type) == 4 ? XENT_I32 : no_dtype;
    else if constexpr (std::is_same_v<Type, std::uint32_t>) return XENT_U32;
    else if constexpr (std::is_same_v<Type, std::uint16_t>) return XENT_U16;
    // a row mask is often an array of bool
    else if constexpr (std::is_same_v<Type, std::uint8_t> || (std::is_same_v<Type, bool> && sizeof(bool) == 1))
        return XENT_U8;
    else if constexpr (is_two_byte_class<Type>) {
        using limits = std::numeric_limits<Type>;
        if constexpr (!limits::is_specialized || limits::is_integer || limits::radix != 2) return no_dtype;
        else if constexpr (limits::digits == 8 && limits::max_exponent == 128) return XENT_BF16;
        else if constexpr (limits::digits == 11 && limits::max_exponent == 16) return XENT_F16;
        else return no_dtype;
    } else return no_dtype;
}

} // namespace detail

/// Whether Type can be the element of an operand.
template <class Type>
inline constexpr bool is_element = detail::find_dtype<std::remove_cv_t<Type>>() != detail::no_dtype;

/// The XENT_* dtype of an element type.
template <class Type>
inline constexpr xent_dtype dtype_of = detail::find_dtype<std::remove_cv_t<Type>>();

template <class Type>
inline constexpr bool is_float_element = is_element<Type> && dtype_of<Type> <= XENT_F16;
template <class Type>
inline constexpr bool is_index_element = is_element<Type> && dtype_of<Type> >= XENT_I64;

namespace detail {

// What the shape and the strides of an operand are, as far as it says so. rank 0 = it does not: packed
// memory, or the caller's strides.
struct layout {
    int rank = 0;
    std::size_t extents[3] = {0, 0, 0};
    std::int64_t strides[3] = {0, 0, 0};

    constexpr std::size_t elements() const noexcept {
        std::size_t count = 1;
        for (int axis = 0; axis < rank; ++axis) count *= extents[axis];
        return count;
    }
};

template <class Strides>
constexpr void set_axis(layout& shape, int axis, std::size_t extent, Strides stride) noexcept {
    shape.extents[axis] = extent;
    shape.strides[axis] = static_cast<std::int64_t>(stride);
}

// The ways in which types tell their two strides.
template <class Type, class = void>
inline constexpr bool has_eigen_strides = false;
template <class Type>
inline constexpr bool has_eigen_strides<Type, std::void_t<decltype(std::declval<Type&>().rowStride()),
                                                          decltype(std::declval<Type&>().colStride())>> = true;
template <class Type, class = void>
inline constexpr bool has_named_strides = false;
template <class Type>
inline constexpr bool has_named_strides<Type, std::void_t<decltype(std::declval<Type&>().row_stride()),
                                                          decltype(std::declval<Type&>().col_stride())>> = true;
template <class Type, class = void>
inline constexpr bool has_numbered_strides = false;
template <class Type>
inline constexpr bool has_numbered_strides<Type, std::void_t<decltype(std::declval<Type&>().stride(0))>> = true;

// The ways in which types tell that they are more than a sequence.
template <class Type, class = void>
inline constexpr bool has_rows_and_cols = false;
template <class Type>
inline constexpr bool has_rows_and_cols<Type, std::void_t<decltype(std::declval<Type&>().rows()),
                                                          decltype(std::declval<Type&>().cols())>> = true;
template <class Type, class = void>
inline constexpr bool has_shape = false;
template <class Type>
inline constexpr bool has_shape<Type, std::void_t<decltype(std::declval<Type&>().shape())>> = true;
template <class Type, class = void>
inline constexpr bool has_strides = false;
template <class Type>
inline constexpr bool has_strides<Type, std::void_t<decltype(std::declval<Type&>().strides())>> = true;

// The type of *data(), void where data() returns no pointer.
template <class Type, class = void>
struct element_at_data {
    using type = void;
};
template <class Type>
struct element_at_data<Type, std::enable_if_t<std::is_pointer_v<decltype(std::data(std::declval<Type&>()))>>> {
    using type = std::remove_pointer_t<decltype(std::data(std::declval<Type&>()))>;
};

template <class Type, class = void>
inline constexpr bool has_size = false;
template <class Type>
inline constexpr bool has_size<Type, std::void_t<decltype(std::size(std::declval<Type&>()))>> = true;

// A contiguous range over Element. Before C++20 the iterator tells no more than random access.
template <class Type, class Element, class = void>
inline constexpr bool is_contiguous_range = false;
template <class Type, class Element>
inline constexpr bool is_contiguous_range<
    Type, Element,
    std::void_t<typename std::iterator_traits<decltype(std::begin(std::declval<Type&>()))>::iterator_category,
                decltype(std::end(std::declval<Type&>()))>> =
#if defined(__cpp_lib_ranges)
    std::ranges::contiguous_range<Type>;
#else
    std::is_base_of_v<std::random_access_iterator_tag,
                      typename std::iterator_traits<decltype(std::begin(std::declval<Type&>()))>::iterator_category> &&
    std::is_same_v<decltype(*std::begin(std::declval<Type&>())), std::add_lvalue_reference_t<Element>>;
#endif

// std::mdspan and those made like it. An accessor that computes its elements returns no reference.
template <class Type, class = void>
inline constexpr bool is_mdspan = false;
template <class Type>
inline constexpr bool
    is_mdspan<Type, std::enable_if_t<std::is_pointer_v<std::decay_t<decltype(std::declval<Type&>().data_handle())>> &&
                                     std::is_same_v<typename std::remove_cv_t<Type>::reference,
                                                    typename std::remove_cv_t<Type>::element_type&> &&
                                     std::remove_cv_t<Type>::is_always_strided() && (std::remove_cv_t<Type>::rank() >= 1) &&
                                     (std::remove_cv_t<Type>::rank() <= 3)>> = true;

enum class fault { none, memory, contiguous, element };

// What is known of an operand's type, where Type may be const: its element, how to read it, or why not.
template <class Type, class = void>
struct container {
    using element = typename element_at_data<Type>::type;
    static constexpr bool is_matrix = has_rows_and_cols<Type> && (has_eigen_strides<Type> || has_named_strides<Type> ||
                                                                  has_numbered_strides<Type>);
    static constexpr bool is_sequence = !has_rows_and_cols<Type> && !has_shape<Type> && !has_strides<Type> &&
                                        has_size<Type> && is_contiguous_range<Type, element>;
    static constexpr fault problem = std::is_void_v<element>        ? fault::memory
                                     : !is_matrix && !is_sequence   ? fault::contiguous
                                     : !xent::is_element<element>   ? fault::element
                                                                    : fault::none;

    static constexpr element* data(Type& from) noexcept { return std::data(from); }
    static constexpr layout shape([[maybe_unused]] Type& from) noexcept {
        layout shape;
        if constexpr (is_matrix) {
            const std::size_t rows = static_cast<std::size_t>(from.rows());
            const std::size_t cols = static_cast<std::size_t>(from.cols());
            shape.rank = 2;
            if constexpr (has_eigen_strides<Type>) {
                set_axis(shape, 0, rows, from.rowStride());
                set_axis(shape, 1, cols, from.colStride());
            } else if constexpr (has_named_strides<Type>) {
                set_axis(shape, 0, rows, from.row_stride());
                set_axis(shape, 1, cols, from.col_stride());
            } else {
                set_axis(shape, 0, rows, from.stride(0));
                set_axis(shape, 1, cols, from.stride(1));
            }
        }
        return shape;
    }
    static constexpr std::size_t elements(Type& from) noexcept {
        if constexpr (is_matrix) return shape(from).elements();
        else return static_cast<std::size_t>(std::size(from));
    }
};

template <class Type>
struct container<Type, std::enable_if_t<is_mdspan<Type>>> {
    using element = typename std::remove_cv_t<Type>::element_type;
    static constexpr bool is_matrix = true;
    static constexpr fault problem = xent::is_element<element> ? fault::none : fault::element;

    static constexpr element* data(Type& from) noexcept { return from.data_handle(); }
    static constexpr layout shape(Type& from) noexcept {
        layout shape;
        shape.rank = static_cast<int>(std::remove_cv_t<Type>::rank());
        for (std::size_t axis = 0; axis < std::remove_cv_t<Type>::rank(); ++axis)
            set_axis(shape, static_cast<int>(axis), static_cast<std::size_t>(from.extent(axis)), from.stride(axis));
        return shape;
    }
    static constexpr std::size_t elements(Type& from) noexcept { return shape(from).elements(); }
};

// Whether a matrix type views memory of another object, as Eigen's blocks and maps do.
template <class Type, class = void>
inline constexpr bool is_matrix_view = is_mdspan<Type>;
template <class Type>
inline constexpr bool is_matrix_view<Type, std::void_t<typename Type::PlainObject>> =
    has_eigen_strides<Type> && !std::is_same_v<std::remove_cv_t<Type>, typename Type::PlainObject>;

// std::span, where the library has no ranges that know of it.
template <class Type>
inline constexpr bool is_span = false;
#if defined(__cpp_lib_span)
template <class Element, std::size_t size>
inline constexpr bool is_span<std::span<Element, size>> = true;
#endif

// An rvalue is taken only if it is a view, since what it points to has to outlive an options object.
template <class Type>
inline constexpr bool outlives_call = std::is_lvalue_reference_v<Type> || is_span<std::remove_cv_t<Type>>
                                      || is_matrix_view<std::remove_reference_t<Type>>
#if defined(__cpp_lib_ranges)
                                      || std::ranges::borrowed_range<Type>
#endif
    ;

template <class Type>
inline constexpr bool is_input_container = container<std::remove_reference_t<Type>>::problem == fault::none;
template <class Type>
inline constexpr bool is_output_container =
    is_input_container<Type> && !std::is_const_v<typename container<std::remove_reference_t<Type>>::element>;

inline constexpr std::size_t unknown_size = static_cast<std::size_t>(-1);

// What the types alone can tell is told by the compiler: one message, for the first that is wrong.
template <class Type>
constexpr bool check_memory() {
    constexpr fault problem = container<std::remove_reference_t<Type>>::problem;
    static_assert(problem != fault::memory,
                  "xent: an operand needs data() that returns a pointer: evaluate an expression into a matrix first");
    static_assert(problem != fault::contiguous,
                  "xent: this operand is no contiguous range, and no matrix with rows(), cols() and strides: write "
                  "xent::input(data, xent::strides{row, classes}) or xent::output(data, xent::strides{row, classes}), "
                  "with the arguments rows and classes");
    return problem != fault::memory && problem != fault::contiguous;
}
template <class Element, bool written>
constexpr bool check_element() {
    static_assert(is_element<Element>,
                  "xent: elements are float, double, xent::bf16 or xent::f16 (or another library's half), std::int64_t, "
                  "int32_t, uint32_t, uint16_t, uint8_t or bool");
    static_assert(!is_element<Element> || !written || !std::is_const_v<Element>,
                  "xent: this operand is written, so its elements are not const");
    return is_element<Element> && !(written && std::is_const_v<Element>);
}

// Says why a type cannot be assigned to an operand of options, results, or a linear layer.
template <class Type, bool written>
constexpr void refuse() {
    using bare = std::remove_reference_t<Type>;
    if constexpr (std::is_pointer_v<bare>) {
        check_element<std::remove_pointer_t<bare>, written>();
    } else if constexpr (check_memory<bare>()) {
        if constexpr (check_element<typename container<bare>::element, written>())
            static_assert(std::is_void_v<bare>,
                          "xent: an operand points to memory of a container, which ends with this statement: give it a "
                          "name");
    }
}

} // namespace detail

// ---- operands -------------------------------------------------------------------------------

/// Strides in elements. strides{n} puts rows n elements apart, the classes of a row side by side.
/// An operand without classes ignores `classes`, the stride of an axis of size 1 is not looked at.
struct strides {
    std::int64_t row = 0;
    std::int64_t classes = 1;
    std::int64_t inner = 1;

    constexpr strides() noexcept = default;
    /// Of any integers: sizes are unsigned, and braces would not narrow them.
    template <class Row, class Classes = int, class Inner = int,
              class = std::enable_if_t<std::is_integral_v<Row> && std::is_integral_v<Classes> && std::is_integral_v<Inner>>>
    constexpr strides(Row row_, Classes classes_ = 1, Inner inner_ = 1) noexcept
        : row(static_cast<std::int64_t>(row_)),
          classes(static_cast<std::int64_t>(classes_)),
          inner(static_cast<std::int64_t>(inner_)) {}
};

/// Memory a call reads. Made from a pointer (packed), a pointer and strides, a matrix, whose shape is
/// then checked, or a container, whose size is: exactly what is needed if packed, enough if strided.
/// Default: absent.
class input {
public:
    input() noexcept = default;
    input(std::nullptr_t) noexcept {}

    template <class Type, class = std::enable_if_t<is_element<Type>>>
    input(const Type* data) noexcept : view_{data, dtype_of<Type>, {0, 0, 0}} {}

    template <class Type, class = std::enable_if_t<is_element<Type>>>
    input(const Type* data, strides by) noexcept : view_{data, dtype_of<Type>, {by.row, by.classes, by.inner}} {}

    template <class Container,
              class = std::enable_if_t<detail::is_input_container<Container> && detail::outlives_call<Container>>>
    input(Container&& from) noexcept : input(detail::container<std::remove_reference_t<Container>>::data(from)) {
        using traits = detail::container<std::remove_reference_t<Container>>;
        size_ = traits::elements(from);
        shape_ = traits::shape(from);
        for (int axis = 0; axis < shape_.rank; ++axis) view_.strides[axis] = shape_.strides[axis];
    }

    template <class Container,
              class = std::enable_if_t<detail::is_input_container<Container> && detail::outlives_call<Container> &&
                                       !detail::container<std::remove_reference_t<Container>>::is_matrix>>
    input(Container&& from, strides by) noexcept : input(std::data(from), by) {
        size_ = static_cast<std::size_t>(std::size(from));
    }

    /// What is no operand does not compile, and the compiler says why.
    template <class Type, class = std::enable_if_t<!std::is_convertible_v<Type, input>>>
    input& operator=(Type&&) noexcept {
        detail::refuse<Type, false>();
        return *this;
    }

    /// The operand as xent.h takes it; a matrix as [rows, classes].
    const xent_input& view() const noexcept { return view_; }
    /// How many elements there are to read; SIZE_MAX if that is not known.
    std::size_t size() const noexcept { return size_; }
    /// The default, a null pointer, or nullptr. (An empty container is present, with size 0.)
    bool absent() const noexcept { return view_.data == nullptr && size_ == detail::unknown_size; }
    /// The shape of a matrix.
    const detail::layout& shape() const noexcept { return shape_; }

private:
    xent_input view_{nullptr, XENT_F32, {0, 0, 0}};
    std::size_t size_ = detail::unknown_size;
    detail::layout shape_{};
};

/// Memory a call writes. As input, but no two of its elements may share an address.
class output {
public:
    output() noexcept = default;
    output(std::nullptr_t) noexcept {}

    template <class Type, class = std::enable_if_t<is_element<Type> && !std::is_const_v<Type>>>
    output(Type* data) noexcept : view_{data, dtype_of<Type>, {0, 0, 0}} {}

    template <class Type, class = std::enable_if_t<is_element<Type> && !std::is_const_v<Type>>>
    output(Type* data, strides by) noexcept : view_{data, dtype_of<Type>, {by.row, by.classes, by.inner}} {}

    template <class Container,
              class = std::enable_if_t<detail::is_output_container<Container> && detail::outlives_call<Container>>>
    output(Container&& from) noexcept : output(detail::container<std::remove_reference_t<Container>>::data(from)) {
        using traits = detail::container<std::remove_reference_t<Container>>;
        size_ = traits::elements(from);
        shape_ = traits::shape(from);
        for (int axis = 0; axis < shape_.rank; ++axis) view_.strides[axis] = shape_.strides[axis];
    }

    template <class Container,
              class = std::enable_if_t<detail::is_output_container<Container> && detail::outlives_call<Container> &&
                                       !detail::container<std::remove_reference_t<Container>>::is_matrix>>
    output(Container&& from, strides by) noexcept : output(std::data(from), by) {
        size_ = static_cast<std::size_t>(std::size(from));
    }

    /// What is no operand does not compile, and the compiler says why.
    template <class Type, class = std::enable_if_t<!std::is_convertible_v<Type, output>>>
    output& operator=(Type&&) noexcept {
        detail::refuse<Type, true>();
        return *this;
    }

    const xent_output& view() const noexcept { return view_; }
    std::size_t size() const noexcept { return size_; }
    bool absent() const noexcept { return view_.data == nullptr && size_ == detail::unknown_size; }
    const detail::layout& shape() const noexcept { return shape_; }

private:
    xent_output view_{nullptr, XENT_F32, {0, 0, 0}};
    std::size_t size_ = detail::unknown_size;
    detail::layout shape_{};
};

// ---- the pool -------------------------------------------------------------------------------

/// Threads of the caller's own, instead of the one pool of the process. Move-only; an options object
/// that points to it must not outlive it. One that was moved from stands for the pool of the process.
class pool {
public:
    /// 0 = as many threads as there are processors. Throws xent::error (XENT_ERR_MEMORY) if they
    /// cannot be had.
    explicit pool(std::uint32_t threads = 0) : handle_(xent_pool_new(threads)) {
        if (!handle_) detail::fail(XENT_ERR_MEMORY, xent_last_error());
    }
    ~pool() { xent_pool_free(handle_); }

    pool(pool&& from) noexcept : handle_(std::exchange(from.handle_, nullptr)) {}
    pool& operator=(pool&& from) noexcept {
        std::swap(handle_, from.handle_);
        return *this;
    }
    pool(const pool&) = delete;
    pool& operator=(const pool&) = delete;

    const xent_pool* get() const noexcept { return handle_; }

private:
    xent_pool* handle_;
};

// ---- options --------------------------------------------------------------------------------

enum class reduction : xent_reduction {
    mean = XENT_MEAN, ///< divided by the (weighted) number of kept rows
    sum = XENT_SUM,
    none = XENT_NONE, ///< row losses alone: use a form that takes results
};

/// Everything that has a default; the defaults are those of XENT_PROBLEM_INIT. An aggregate: C++20
/// writes forward(logits, classes, targets, {.label_smoothing = 0.1}).
struct options {
    xent::reduction reduction = xent::reduction::mean;
    std::int64_t ignore_index = -100; ///< rows with this target index count for nothing; any integer
    double label_smoothing = 0;       ///< [0, 1]
    double normalizer = 0;            ///< > 0 replaces the mean's denominator of the cross-entropy part
    double z_normalizer = 0;          ///< ... and that of the z-loss part and of the entropy bonus
    double z_loss = 0;                ///< lambda of lambda * lse^2, added to each row's loss
    double softcap = 0;               ///< x -> cap * tanh(x / cap), after logit_scale; 0 = off
    double logit_scale = 1;           ///< x -> scale * x; > 0: 1 / temperature
    bool log_probs = false;           ///< the "logits" are log-probabilities: NLLLoss; there is no lse then
    bool empty_is_zero = false;       ///< the mean over no kept rows is 0 instead of NaN
    bool accumulate = false;          ///< add to the gradient instead of overwriting it
    bool zero_padding = false;        ///< set what lies between the rows of the gradient to 0

    input class_weights{}; ///< [classes]
    input row_weights{};   ///< [rows]
    input row_mask{};      ///< [rows] of bytes or bools; 0 = treated as ignored, whatever the target

    /// For the calls with a gradient: d(objective) / d(loss), one element, or [rows] with
    /// reduction::none. Absent = 1.
    input grad_output{};
    double grad_scale = 1; ///< multiplies on top: loss scaling, 1 / accumulation steps

    std::size_t inner = 1;            ///< inner positions: logits [rows, classes, inner]
    std::uint32_t threads = 0;        ///< 0 = the whole pool, 1 = the calling thread alone, n = at most n
    const xent::pool* pool = nullptr; ///< null = the pool of the process

    /// Sparse targets: [rows, target_count] class indices, of which the targets are the probabilities. A place
    /// that holds ignore_index is unused; other classes have the probability 0.
    input target_classes{};
    std::size_t target_count = 0; ///< places of a row; 0 = as many as target_classes has
    double target_scale = 0;      ///< > 0: the targets are a teacher's logits: softmax(target_scale * targets)
    double entropy_bonus = 0; ///< beta: each row's loss has -beta * entropy more; of either sign
};

/// What a forward is to hand back besides, or instead of, its return value. Null = not wanted; all
/// of it comes from one pass over the logits. Without targets: lse, argmax, entropy, top classes.
struct results {
    double* loss = nullptr;            ///< the reduced loss; not with reduction::none
    output row_losses{};               ///< float or double [rows]; 0 where ignored
    double* lse = nullptr;             ///< [rows]: log-sum-exp of each row's logits, what backward takes
    double* z_loss = nullptr;          ///< the z-loss part of the loss; not with reduction::none
    double* normalizer = nullptr;      ///< what a mean divides by, whatever the reduction
    double* z_normalizer = nullptr;    ///< ... for the z-loss part and the entropy bonus
    std::uint64_t* kept_rows = nullptr; ///< rows that count
    std::int64_t* argmax = nullptr;    ///< [rows]: the predicted class; the lowest of several
    std::uint64_t* correct = nullptr;  ///< kept rows whose predicted class is the target; index targets only
    output entropy{};                  ///< float or double [rows]: entropy of the softmax
    output kl{};                       ///< ... the divergence of the softmax from probability targets
    double* entropy_bonus = nullptr;   ///< the entropy bonus's part of the loss; not with reduction::none
    std::int64_t* top_classes = nullptr; ///< [rows, top_count]: the classes of the largest logits, the largest first
    output top_log_probs{};            ///< float or double [rows, top_count]: their log-probabilities
    std::size_t top_count = 0;         ///< classes listed for each row, at most 64
    std::int64_t* target_ranks = nullptr; ///< [rows]: classes before the target in that order; -1 where ignored
};

/// A linear layer that makes the logits: hidden * weight^T + bias. They are never stored.
struct linear {
    std::size_t features = 0;
    input hidden{};            ///< float, double or a half, [rows, features]; the features of a row are contiguous
    input weight{};            ///< [classes, features], of the element type of hidden
    input bias{};              ///< [classes]
    std::size_t workspace = 0; ///< bytes that a call may allocate; 0 = as few as run near full speed
};

/// Where the gradients of a linear layer go. One that is absent is not computed, nor its matrix product.
struct linear_grads {
    output hidden{}; ///< [rows, features]: the element type of hidden, or float; ignored rows get 0
    output weight{}; ///< [classes, features]: the element type of weight, or float
    output bias{};   ///< [classes], any floating type
    bool accumulate_hidden = false; ///< add to what hidden holds
    bool accumulate_weight = false; ///< ... to what weight holds
    bool accumulate_bias = false;   ///< ... to what bias holds
};

/// Options of softmax and log_softmax.
struct softmax_options {
    std::size_t inner = 1;            ///< inner positions: operands are [rows, classes, inner]
    std::uint32_t threads = 0;        ///< 0 = the whole pool, 1 = the calling thread alone, n = at most n
    const xent::pool* pool = nullptr; ///< null = the pool of the process
};

// ---- from here to xent.h --------------------------------------------------------------------

namespace detail {

inline void check(xent_status status) {
    if (status != XENT_OK) fail(status, xent_last_error());
}

[[noreturn]] inline void size_error(const char* name, std::size_t has, std::size_t needs, const char* how,
                                    const char* hint) {
    fail(XENT_ERR_SHAPE, std::string(name) + " has " + std::to_string(has) + " elements, needs " + how +
                             std::to_string(needs) + hint);
}

// A product no container can have the size of where it overflows: xent.h reports that itself.
inline std::size_t times(std::size_t left, std::size_t right) noexcept {
    return right != 0 && left > unknown_size / right ? unknown_size : left * right;
}

// The size of a container against the elements a call touches. What is wrong with the strides
// themselves is left for xent.h to say.
template <class View>
void check_size(const char* name, const View& view, std::size_t size, std::size_t rows, std::size_t classes,
                std::size_t inner, const char* hint = "") {
    if (size == unknown_size) return;
    const std::size_t sizes[3] = {rows, classes, inner};
    std::size_t packed = times(times(rows, classes), inner);
    if (packed == unknown_size) return;
    bool strided = false;
    for (int axis = 0; axis < 3; ++axis) strided = strided || (sizes[axis] > 1 && view.strides[axis] != 0);
    if (!strided) {
        if (size != packed) size_error(name, size, packed, "", hint);
        return;
    }
    std::size_t extent = packed == 0 ? 0 : 1;
    for (int axis = 0; axis < 3 && packed != 0; ++axis) {
        if (sizes[axis] <= 1) continue;
        if (view.strides[axis] < 0) return;
        std::size_t reach = times(sizes[axis] - 1, static_cast<std::size_t>(view.strides[axis]));
        if (reach > unknown_size - 1 - extent) return;
        extent += reach;
    }
    if (size < extent) size_error(name, size, extent, "at least ", hint);
}

inline std::string shape_text(const std::size_t* extents, int rank) {
    std::string text;
    for (int axis = 0; axis < rank; ++axis) text += (axis == 0 ? "" : " x ") + std::to_string(extents[axis]);
    return text;
}

// The strides of a matrix for the axes [rows, classes, inner] of an operand. Axes of size 1 count on
// neither side. A vector of all elements is packed memory, each element a stride apart.
template <class View>
void set_strides(const char* name, View& view, const layout& shape, std::size_t rows, std::size_t classes,
                 std::size_t inner, const char* hint) {
    const std::size_t sizes[3] = {rows, classes, inner};
    std::int64_t by[3] = {1, 1, 1};
    int next = 0, last = 0;
    bool fits = true;
    for (int axis = 0; axis < 3; ++axis) {
        if (sizes[axis] == 1) continue;
        while (next < shape.rank && shape.extents[next] == 1) ++next;
        fits = fits && next < shape.rank && shape.extents[next] == sizes[axis];
        if (fits) by[axis] = shape.strides[next++];
    }
    while (next < shape.rank && shape.extents[next] == 1) ++next;
    fits = fits && next == shape.rank;
    if (!fits) {
        int axes = 0;
        for (int axis = 0; axis < shape.rank; ++axis) {
            if (shape.extents[axis] == 1) continue;
            ++axes;
            last = axis;
        }
        if (axes > 1 || shape.elements() != times(times(rows, classes), inner)) {
            const int needed = inner != 1 ? 3 : classes != 1 && rows != 1 ? 2 : rows != 1 || classes == 1 ? 1 : 2;
            fail(XENT_ERR_SHAPE, std::string(name) + " is " + shape_text(shape.extents, shape.rank) + ", needs " +
                                     shape_text(sizes, needed) + hint);
        }
        by[2] = shape.strides[last];
        by[1] = by[2] * static_cast<std::int64_t>(inner);
        by[0] = by[1] * static_cast<std::int64_t>(classes);
    }
    bool several = false, moves = false;
    for (int axis = 0; axis < 3; ++axis) {
        view.strides[axis] = by[axis];
        several = several || sizes[axis] > 1;
        moves = moves || (sizes[axis] > 1 && by[axis] != 0);
    }
    // xent.h takes strides that are all zero for packed memory
    if (several && !moves && shape.elements() != 0)
        fail(XENT_ERR_STRIDE, std::string(name) + " has the stride 0 on every axis: its elements are all one");
}

// The operand as xent.h takes it for these axes, once its size or its shape is known to fit.
template <class Operand>
auto resolve(const char* name, const Operand& from, std::size_t rows, std::size_t classes, std::size_t inner,
             const char* hint = "") {
    auto view = from.view();
    if (from.shape().rank == 0) check_size(name, view, from.size(), rows, classes, inner, hint);
    else set_strides(name, view, from.shape(), rows, classes, inner, hint);
    return view;
}

inline bool is_probabilities(const input& targets) noexcept { return targets.view().dtype <= XENT_F16; }

struct call {
    xent_problem problem = XENT_PROBLEM_INIT;
    xent_input loss_gradient{nullptr, XENT_F32, {0, 0, 0}};

    call(const input& logits, std::size_t rows, std::size_t classes, const input& targets, const options& with)
        : call(logits, rows, classes, targets, with, classes) {}

    // over a shard of a vocabulary, whose classes all have weights
    call(const input& logits, std::size_t rows, std::size_t classes, const input& targets, const options& with,
         std::size_t total_classes) {
        problem.flags = (with.log_probs ? std::uint32_t{XENT_FLAG_LOG_PROBS} : 0u) |
                        (with.empty_is_zero ? std::uint32_t{XENT_FLAG_EMPTY_IS_ZERO} : 0u) |
                        (with.accumulate ? std::uint32_t{XENT_FLAG_ACCUMULATE} : 0u) |
                        (with.zero_padding ? std::uint32_t{XENT_FLAG_ZERO_PADDING} : 0u);
        problem.rows = rows;
        problem.classes = classes;
        problem.inner = with.inner;
        problem.ignore_index = with.ignore_index;
        problem.label_smoothing = with.label_smoothing;
        problem.z_loss = with.z_loss;
        problem.softcap = with.softcap;
        problem.logit_scale = with.logit_scale;
        problem.normalizer = with.normalizer;
        problem.z_normalizer = with.z_normalizer;
        problem.reduction = static_cast<xent_reduction>(with.reduction);
        problem.threads = with.threads;
        problem.pool = with.pool ? with.pool->get() : nullptr;
        problem.entropy_bonus = with.entropy_bonus;
        problem.logits = resolve("logits", logits, rows, classes, with.inner);
        problem.target_scale = with.target_scale;
        problem.target_count = with.target_count;
        const input& listed = with.target_classes;
        if (!listed.absent() && with.target_count == 0 && listed.size() != unknown_size && times(rows, with.inner) != 0)
            problem.target_count = listed.size() / times(rows, with.inner);
        problem.target_classes = resolve("target_classes", listed, rows, problem.target_count, with.inner);
        // probabilities are as wide as the logits, or as the lists
        const std::size_t wide = listed.absent() ? classes : problem.target_count;
        problem.targets = resolve("targets", targets, rows, is_probabilities(targets) ? wide : 1, with.inner,
                                  is_probabilities(targets) && targets.size() == times(rows, with.inner)
                                      ? ": floating-point targets are probabilities [rows, classes]; class indices "
                                        "are std::int64_t, int32_t, uint32_t, uint16_t or uint8_t"
                                      : "");
        problem.class_weights = resolve("class_weights", with.class_weights, 1, total_classes, 1);
        problem.row_weights = resolve("row_weights", with.row_weights, rows, 1, with.inner);
        problem.row_mask = resolve("row_mask", with.row_mask, rows, 1, with.inner);
        grad_output_ = &with.grad_output;
    }

    xent_results to_fill(const results& wanted) const {
        xent_results filled = XENT_RESULTS_INIT;
        filled.loss = wanted.loss;
        filled.lse = wanted.lse;
        filled.z_loss = wanted.z_loss;
        filled.normalizer = wanted.normalizer;
        filled.z_normalizer = wanted.z_normalizer;
        filled.kept_rows = wanted.kept_rows;
        filled.argmax = wanted.argmax;
        filled.correct = wanted.correct;
        filled.entropy_bonus = wanted.entropy_bonus;
        filled.row_losses = resolve("row_losses", wanted.row_losses, problem.rows, 1, problem.inner);
        filled.entropy = resolve("entropy", wanted.entropy, problem.rows, 1, problem.inner);
        filled.kl = resolve("kl", wanted.kl, problem.rows, 1, problem.inner);
        filled.top_classes = wanted.top_classes;
        filled.top_count = wanted.top_count;
        filled.target_ranks = wanted.target_ranks;
        filled.top_log_probs =
            resolve("top_log_probs", wanted.top_log_probs, problem.rows, wanted.top_count, problem.inner);
        return filled;
    }

    const xent_input* grad_output() {
        const bool per_row = problem.reduction == XENT_NONE;
        loss_gradient =
            resolve("grad_output", *grad_output_, per_row ? problem.rows : 1, 1, per_row ? problem.inner : 1);
        return grad_output_->absent() ? nullptr : &loss_gradient;
    }

    xent_output gradient(const char* name, const output& grad) const {
        return resolve(name, grad, problem.rows, problem.classes, problem.inner);
    }

private:
    const input* grad_output_ = nullptr;
};

// A call of a linear layer.
struct linear_call {
    detail::call call;
    xent_linear layer = XENT_LINEAR_INIT;
    xent_linear_grads grads = XENT_LINEAR_GRADS_INIT;

    linear_call(const linear& from, std::size_t rows, std::size_t classes, const input& targets, const options& with,
                const linear_grads& to = {})
        : linear_call(from, rows, classes, targets, with, to, classes) {}

    // over a shard of a vocabulary
    linear_call(const linear& from, std::size_t rows, std::size_t classes, const input& targets, const options& with,
                const linear_grads& to, std::size_t total_classes)
        : call(input(), rows, classes, targets, with, total_classes) {
        if (from.features == 0 && rows > 0)
            fail(XENT_ERR_SHAPE, "linear.features is 0: set it to the number of columns of hidden and weight");
        layer.features = from.features;
        layer.hidden = resolve("hidden", from.hidden, rows, from.features, 1);
        layer.weight = resolve("weight", from.weight, classes, from.features, 1);
        layer.bias = resolve("bias", from.bias, 1, classes, 1);
        layer.workspace = from.workspace;
        layer.flags = (to.accumulate_hidden ? std::uint32_t{XENT_LINEAR_ACCUMULATE_HIDDEN} : 0u) |
                      (to.accumulate_weight ? std::uint32_t{XENT_LINEAR_ACCUMULATE_WEIGHT} : 0u) |
                      (to.accumulate_bias ? std::uint32_t{XENT_LINEAR_ACCUMULATE_BIAS} : 0u);
        grads.hidden = resolve("grads.hidden", to.hidden, rows, from.features, 1);
        grads.weight = resolve("grads.weight", to.weight, classes, from.features, 1);
        grads.bias = resolve("grads.bias", to.bias, 1, classes, 1);
    }
};

inline void need_reduced_loss(const options& with) {
    if (with.reduction == reduction::none)
        fail(XENT_ERR_PARAM, "reduction::none has no loss to return: ask for results.row_losses");
}

// What may stand for a container in a call. Any class or array: one that cannot be taken gets a
// message of its own.
template <class Type>
inline constexpr bool is_own_type =
    std::is_same_v<Type, input> || std::is_same_v<Type, output> || std::is_same_v<Type, results> ||
    std::is_same_v<Type, options> || std::is_same_v<Type, softmax_options> || std::is_same_v<Type, strides> ||
    std::is_same_v<Type, pool> || std::is_same_v<Type, linear> || std::is_same_v<Type, linear_grads>;
template <class Type>
inline constexpr bool is_operand =
    (std::is_class_v<std::remove_reference_t<Type>> || std::is_array_v<std::remove_reference_t<Type>>) &&
    !is_own_type<std::remove_cv_t<std::remove_reference_t<Type>>>;
template <class... Types>
using if_operands = std::enable_if_t<(is_operand<Types> && ...)>;

template <class Type>
using element_of = typename container<std::remove_reference_t<Type>>::element;

template <class Element>
constexpr bool check_logits() {
    static_assert(is_float_element<Element>,
                  "xent: logits are float, double, xent::bf16 or xent::f16 (or another library's half)");
    return is_float_element<Element>;
}
template <class Element>
constexpr bool check_targets() {
    static_assert(is_element<Element>, "xent: targets are class indices (std::int64_t, int32_t, uint32_t, uint16_t or "
                                       "uint8_t) or probabilities (float, double, xent::bf16 or xent::f16)");
    return is_element<Element>;
}
template <class Element, class Gradient>
constexpr bool check_gradient() {
    static_assert(!std::is_const_v<Gradient>, "xent: the gradient is written, so its elements are not const");
    constexpr bool same = dtype_of<Gradient> == dtype_of<Element> || dtype_of<Gradient> == XENT_F32;
    static_assert(std::is_const_v<Gradient> || same, "xent: the gradient has the element type of the logits, or float");
    return !std::is_const_v<Gradient> && same;
}
template <class Target, class Gradient>
constexpr bool check_target_gradient() {
    static_assert(is_float_element<Target>, "xent: class indices have no gradient: targets are probabilities (float, "
                                            "double, xent::bf16 or xent::f16)");
    constexpr bool written = !std::is_const_v<Gradient> && is_float_element<Gradient>;
    static_assert(!is_float_element<Target> || written,
                  "xent: the gradient is written: float, double, xent::bf16 or xent::f16, not const");
    return is_float_element<Target> && written;
}
template <class Written, class... Read>
constexpr bool check_family() {
    static_assert(is_float_element<Written>,
                  "xent: operands are float, double, xent::bf16 or xent::f16 (or another library's half)");
    static_assert(!is_float_element<Written> || ((dtype_of<Written> == dtype_of<Read>) && ...),
                  "xent: all operands of a call have one element type");
    static_assert(!std::is_const_v<Written>, "xent: the last operand is written, so its elements are not const");
    return is_float_element<Written> && !std::is_const_v<Written> && ((dtype_of<Written> == dtype_of<Read>) && ...);
}

// Those of a call's pointers.
template <class Logit, class Target>
constexpr bool check_types() {
    if constexpr (check_logits<Logit>()) return check_targets<Target>();
    else return false;
}
template <class Logit, class Target, class Gradient>
constexpr bool check_types() {
    if constexpr (check_types<Logit, Target>()) return check_gradient<Logit, Gradient>();
    else return false;
}
template <class Logit, class Target, class Gradient>
constexpr bool check_target_types() {
    if constexpr (check_types<Logit, Target>()) return check_target_gradient<Target, Gradient>();
    else return false;
}

template <class First, class... Others>
constexpr bool check_memories() {
    if constexpr (!check_memory<First>()) return false;
    else if constexpr (sizeof...(Others) != 0) return check_memories<Others...>();
    else return true;
}

// Those of its containers.
template <class Logits, class Targets>
constexpr bool check_operands() {
    if constexpr (check_memories<Logits, Targets>()) return check_types<element_of<Logits>, element_of<Targets>>();
    else return false;
}
template <class Logits, class Targets, class Gradient>
constexpr bool check_operands() {
    if constexpr (check_memories<Logits, Targets, Gradient>())
        return check_types<element_of<Logits>, element_of<Targets>, element_of<Gradient>>();
    else return false;
}
template <class Logits, class Targets, class Gradient>
constexpr bool check_target_operands() {
    if constexpr (check_memories<Logits, Targets, Gradient>())
        return check_target_types<element_of<Logits>, element_of<Targets>, element_of<Gradient>>();
    else return false;
}
template <class Written, class... Read>
constexpr bool check_family_operands() {
    if constexpr (check_memories<Read..., Written>()) return check_family<element_of<Written>, element_of<Read>...>();
    else return false;
}
template <class Lse>
constexpr bool check_lse() {
    if constexpr (check_memory<Lse>()) {
        static_assert(dtype_of<element_of<Lse>> == XENT_F64, "xent: lse is double");
        return dtype_of<element_of<Lse>> == XENT_F64;
    } else return false;
}

// A contiguous range of the states of rows.
template <class States>
auto states_of(States& states) {
    auto* data = std::data(states);
    static_assert(std::is_same_v<std::remove_const_t<std::remove_pointer_t<decltype(data)>>, xent_partial>,
                  "xent: states are a contiguous range of xent::partial");
    return data;
}

// The rows of a call, of which each state is one.
template <class States>
std::size_t rows_of_states(const char* name, const States& states, std::size_t inner) {
    const auto size = static_cast<std::size_t>(std::size(states));
    const std::size_t rows = inner == 0 ? 0 : size / inner;
    if (times(rows, inner) != size) size_error(name, size, times(rows, inner), "", ": one for each row and position");
    return rows;
}

// The rows of logits, or of an operand like them.
template <class Logits>
std::size_t rows_of_logits(const Logits& logits, std::size_t classes, std::size_t inner) {
    using traits = container<const Logits>;
    if constexpr (traits::is_matrix) {
        const layout shape = traits::shape(logits);
        bool matrix = shape.rank > 1;
        for (int axis = 0; axis < shape.rank; ++axis) matrix = matrix && shape.extents[axis] != 1;
        if (matrix) return shape.extents[0];
    }
    const std::size_t per_row = times(classes, inner);
    return per_row == 0 ? 0 : traits::elements(logits) / per_row;
}

// Those of a call: of a matrix of logits, else of class indices, else of the logits.
template <class Logits, class Targets>
std::size_t rows_of(const Logits& logits, std::size_t classes, const Targets& targets, std::size_t inner) {
    if constexpr (container<const Logits>::is_matrix || is_float_element<element_of<const Targets>>)
        return rows_of_logits(logits, classes, inner);
    else return inner == 0 ? 0 : container<const Targets>::elements(targets) / inner;
}

// Where options.log_probs leaves no lse, any container will do, an empty one too.
template <class Lse>
const double* lse_of(const Lse& lse, std::size_t rows, const options& with) {
    const input from(lse);
    if (with.log_probs) return static_cast<const double*>(from.view().data);
    const xent_input view = resolve("lse", from, rows, 1, with.inner);
    const bool packed = from.shape().rank == 0 || ((with.inner <= 1 || view.strides[2] == 1) &&
                                                   (rows <= 1 || view.strides[0] == static_cast<std::int64_t>(with.inner)));
    if (!packed) fail(XENT_ERR_STRIDE, "lse is read as packed memory; this one has strides");
    return static_cast<const double*>(view.data);
}

// softmax, log_softmax and their gradients
struct family_call {
    xent_shape shape = XENT_SHAPE_INIT;

    family_call(std::size_t rows, std::size_t classes, const softmax_options& with) {
        shape.rows = rows;
        shape.classes = classes;
        shape.inner = with.inner;
        shape.threads = with.threads;
        shape.pool = with.pool ? with.pool->get() : nullptr;
    }

    template <class Operand>
    auto operand(const char* name, const Operand& from) const {
        return resolve(name, from, shape.rows, shape.classes, shape.inner);
    }
};

using family_forward = xent_status (*)(const xent_shape*, const xent_input*, const xent_output*);
using family_backward = xent_status (*)(const xent_shape*, const xent_input*, const xent_input*, const xent_output*);

inline void run(family_forward function, const input& from, std::size_t rows, std::size_t classes, const output& to,
                const softmax_options& with) {
    const family_call call(rows, classes, with);
    const xent_input read = call.operand("x", from);
    const xent_output written = call.operand("y", to);
    check(function(&call.shape, &read, &written));
}

inline void run(family_backward function, const input& values, std::size_t rows, std::size_t classes,
                const input& grad_y, const output& grad_x, const softmax_options& with) {
    const family_call call(rows, classes, with);
    const xent_input read = call.operand("y", values);
    const xent_input gradient = call.operand("grad_y", grad_y);
    const xent_output written = call.operand("grad_x", grad_x);
    check(function(&call.shape, &read, &gradient, &written));
}

template <class From, class To>
void run_containers(family_forward function, const From& from, std::size_t classes, To& to,
                    const softmax_options& with) {
    if constexpr (check_family_operands<To, const From>())
        run(function, input(from), rows_of_logits(from, classes, with.inner), classes, output(to), with);
}

template <class Values, class GradY, class GradX>
void run_containers(family_backward function, const Values& values, std::size_t classes, const GradY& grad_y,
                    GradX& grad_x, const softmax_options& with) {
    if constexpr (check_family_operands<GradX, const Values, const GradY>())
        run(function, input(values), rows_of_logits(values, classes, with.inner), classes, input(grad_y),
            output(grad_x), with);
}

} // namespace detail

// ---- views: any layout ----------------------------------------------------------------------

/// Fills `out` from one pass over the logits.
inline void forward(const input& logits, std::size_t rows, std::size_t classes, const input& targets,
                    const results& out, const options& with = {}) {
    detail::call call(logits, rows, classes, targets, with);
    xent_results filled = call.to_fill(out);
    detail::check(xent_forward(&call.problem, &filled));
}

/// The reduced loss. reduction::none has none: XENT_ERR_PARAM.
inline double forward(const input& logits, std::size_t rows, std::size_t classes, const input& targets,
                      const options& with = {}) {
    detail::need_reduced_loss(with);
    double loss = 0;
    results out;
    out.loss = &loss;
    forward(logits, rows, classes, targets, out, with);
    return loss;
}

/// Fills `out` with what there is without targets: lse, argmax, entropy, top classes.
inline void evaluate(const input& logits, std::size_t rows, std::size_t classes, const results& out,
                     const options& with = {}) {
    forward(logits, rows, classes, input(), out, with);
}

/// Writes (or, with options.accumulate, adds) the gradient with respect to the logits. `lse` holds
/// one double a row, from results.lse of a forward; it may be null with options.log_probs. `grad` may
/// be exactly the logits, which are then overwritten. Ignored rows get 0.
inline void backward(const input& logits, std::size_t rows, std::size_t classes, const input& targets,
                     const double* lse, const output& grad, const options& with = {}) {
    detail::call call(logits, rows, classes, targets, with);
    const xent_output to = call.gradient("grad_logits", grad);
    detail::check(xent_backward(&call.problem, lse, call.grad_output(), with.grad_scale, &to));
}

/// Writes (or adds) the gradient with respect to probability targets, for distillation:
/// r * (1 - eps) * w_c * (lse - x_c), times what the reduction multiplies with. `lse` as in backward;
/// `grad_targets` has any floating type and overlaps nothing else. Ignored rows get 0.
inline void backward_targets(const input& logits, std::size_t rows, std::size_t classes, const input& targets,
                             const double* lse, const output& grad_targets, const options& with = {}) {
    detail::call call(logits, rows, classes, targets, with);
    const xent_output to = call.gradient("grad_targets", grad_targets);
    detail::check(xent_backward_targets(&call.problem, lse, call.grad_output(), with.grad_scale, &to));
}

/// The gradient, and `out` filled.
inline void forward_backward(const input& logits, std::size_t rows, std::size_t classes, const input& targets,
                             const results& out, const output& grad, const options& with = {}) {
    detail::call call(logits, rows, classes, targets, with);
    xent_results filled = call.to_fill(out);
    const xent_output to = call.gradient("grad_logits", grad);
    detail::check(xent_forward_backward(&call.problem, call.grad_output(), with.grad_scale, &filled, &to));
}

/// The gradient and the reduced loss. reduction::none has none: XENT_ERR_PARAM.
inline double forward_backward(const input& logits, std::size_t rows, std::size_t classes, const input& targets,
                               const output& grad, const options& with = {}) {
    detail::need_reduced_loss(with);
    double loss = 0;
    results out;
    out.loss = &loss;
    forward_backward(logits, rows, classes, targets, out, grad, with);
    return loss;
}

/// Fills `out` with the loss of a linear layer's logits and other results. Ignored rows cost no arithmetic, unless
/// lse, argmax, entropy or top classes are wanted, which are results of all rows.
inline void forward(const linear& layer, std::size_t rows, std::size_t classes, const input& targets,
                    const results& out, const options& with = {}) {
    detail::linear_call call(layer, rows, classes, targets, with);
    const xent_results filled = call.call.to_fill(out);
    detail::check(xent_linear_forward(&call.call.problem, &call.layer, &filled));
}

/// The reduced loss. reduction::none has none: XENT_ERR_PARAM.
inline double forward(const linear& layer, std::size_t rows, std::size_t classes, const input& targets,
                      const options& with = {}) {
    detail::need_reduced_loss(with);
    double loss = 0;
    results out;
    out.loss = &loss;
    forward(layer, rows, classes, targets, out, with);
    return loss;
}

/// Fills `out` with what there is without targets: lse, argmax, entropy, top classes.
inline void evaluate(const linear& layer, std::size_t rows, std::size_t classes, const results& out,
                     const options& with = {}) {
    forward(layer, rows, classes, input(), out, with);
}

/// The gradients of a linear layer, from results.lse of a forward: for losses whose factors depend on the row
/// losses.
inline void backward(const linear& layer, std::size_t rows, std::size_t classes, const input& targets,
                     const double* lse, const linear_grads& grads, const options& with = {}) {
    detail::linear_call call(layer, rows, classes, targets, with, grads);
    detail::check(xent_linear_backward(&call.call.problem, &call.layer, lse, call.call.grad_output(), with.grad_scale,
                                       &call.grads));
}

/// The gradients of a linear layer, and `out` filled.
inline void forward_backward(const linear& layer, std::size_t rows, std::size_t classes, const input& targets,
                             const results& out, const linear_grads& grads, const options& with = {}) {
    detail::linear_call call(layer, rows, classes, targets, with, grads);
    const xent_results filled = call.call.to_fill(out);
    detail::check(xent_linear_forward_backward(&call.call.problem, &call.layer, call.call.grad_output(),
                                               with.grad_scale, &filled, &call.grads));
}

/// The gradients of a linear layer, and the reduced loss. reduction::none has none: XENT_ERR_PARAM.
inline double forward_backward(const linear& layer, std::size_t rows, std::size_t classes, const input& targets,
                               const linear_grads& grads, const options& with = {}) {
    detail::need_reduced_loss(with);
    double loss = 0;
    results out;
    out.loss = &loss;
    forward_backward(layer, rows, classes, targets, out, grads, with);
    return loss;
}

/// What is known of a row after the classes of some shards of a vocabulary: plain data of 48 bytes, which
/// processes and machines can exchange.
using partial = xent_partial;

/// The state of no classes, where a merge starts.
inline constexpr partial empty_partial = XENT_PARTIAL_INIT;

/// Writes the state of each row over one shard: over the classes class_offset .. class_offset + classes of
/// total_classes. Logits, and probability targets, are the shard's columns; target indices and
/// options.class_weights are those of the whole vocabulary. `partials` holds rows * inner states.
inline void partial_forward(const input& logits, std::size_t rows, std::size_t classes, const input& targets,
                            std::size_t class_offset, std::size_t total_classes, partial* partials,
                            const options& with = {}) {
    detail::call call(logits, rows, classes, targets, with, total_classes);
    detail::check(xent_partial_forward(&call.problem, class_offset, total_classes, partials));
}

/// Merges each of `count` states of some shards into the one of other shards at its place: in any order, by any
/// tree.
inline void partial_merge(partial* into, const partial* from, std::size_t count) noexcept {
    xent_partial_merge(into, from, count);
}

/// Fills `out` from the merged states of all shards. Of the targets it reads indices alone: probabilities of
/// any shard serve.
inline void partial_finish(std::size_t rows, const input& targets, std::size_t total_classes, const partial* merged,
                           const results& out, const options& with = {}) {
    const bool reads = !detail::is_probabilities(targets);
    detail::call call(input(), rows, 0, reads ? targets : input(), with, total_classes);
    if (!reads) call.problem.targets = targets.view();
    call.problem.classes = targets.absent() ? 1 : 0;
    const xent_results filled = call.to_fill(out);
    detail::check(xent_partial_finish(&call.problem, total_classes, merged, &filled));
}

/// The reduced loss. reduction::none has none: XENT_ERR_PARAM.
inline double partial_finish(std::size_t rows, const input& targets, std::size_t total_classes, const partial* merged,
                             const options& with = {}) {
    detail::need_reduced_loss(with);
    double loss = 0;
    results out;
    out.loss = &loss;
    partial_finish(rows, targets, total_classes, merged, out, with);
    return loss;
}

/// Writes (or adds) the gradient with respect to the logits of one shard, from the merged states of all shards.
/// The operands are those of partial_forward; `grad` is as in backward.
inline void partial_backward(const input& logits, std::size_t rows, std::size_t classes, const input& targets,
                             std::size_t class_offset, std::size_t total_classes, const partial* merged,
                             const output& grad, const options& with = {}) {
    detail::call call(logits, rows, classes, targets, with, total_classes);
    const xent_output to = call.gradient("grad_logits", grad);
    detail::check(xent_partial_backward(&call.problem, class_offset, total_classes, merged, call.grad_output(),
                                        with.grad_scale, &to));
}

/// Writes the state of each row over one shard whose logits a linear layer makes: weight and bias are those of the
/// shard's classes. partial_finish takes the merged states.
inline void partial_forward(const linear& layer, std::size_t rows, std::size_t classes, const input& targets,
                            std::size_t class_offset, std::size_t total_classes, partial* partials,
                            const options& with = {}) {
    detail::linear_call call(layer, rows, classes, targets, with, {}, total_classes);
    detail::check(xent_linear_partial_forward(&call.call.problem, &call.layer, class_offset, total_classes, partials));
}

/// What one shard contributes to the gradients of a linear layer, from the merged states of all shards. The gradients
/// of weight and bias are those of the shard's classes; that of the hidden states is a part, which the shards add up.
inline void partial_backward(const linear& layer, std::size_t rows, std::size_t classes, const input& targets,
                             std::size_t class_offset, std::size_t total_classes, const partial* merged,
                             const linear_grads& grads, const options& with = {}) {
    detail::linear_call call(layer, rows, classes, targets, with, grads, total_classes);
    detail::check(xent_linear_partial_backward(&call.call.problem, &call.layer, class_offset, total_classes, merged,
                                               call.call.grad_output(), with.grad_scale, &call.grads));
}

/// y = softmax of x over the classes. x and y have one type (XENT_ERR_DTYPE) and any layout: any axis of any tensor.
/// y may be exactly x.
inline void softmax(const input& xs, std::size_t rows, std::size_t classes, const output& ys,
                    const softmax_options& with = {}) {
    detail::run(xent_softmax, xs, rows, classes, ys, with);
}

/// grad_x = y * (grad_y - sum of y * grad_y), with y what softmax gave. grad_x may be exactly y or
/// exactly grad_y.
inline void softmax_backward(const input& ys, std::size_t rows, std::size_t classes, const input& grad_y,
                             const output& grad_x, const softmax_options& with = {}) {
    detail::run(xent_softmax_backward, ys, rows, classes, grad_y, grad_x, with);
}

/// y = x - ln sum of exp x, as softmax.
inline void log_softmax(const input& xs, std::size_t rows, std::size_t classes, const output& ys,
                        const softmax_options& with = {}) {
    detail::run(xent_log_softmax, xs, rows, classes, ys, with);
}

/// grad_x = grad_y - exp(y) * sum of grad_y, with y what log_softmax gave; as softmax_backward.
inline void log_softmax_backward(const input& ys, std::size_t rows, std::size_t classes, const input& grad_y,
                                 const output& grad_x, const softmax_options& with = {}) {
    detail::run(xent_log_softmax_backward, ys, rows, classes, grad_y, grad_x, with);
}

// ---- pointers: packed, types checked by the compiler ----------------------------------------

template <class Logit, class Target>
double forward(const Logit* logits, std::size_t rows, std::size_t classes, const Target* targets,
               const options& with = {}) {
    if constexpr (detail::check_types<Logit, Target>())
        return forward(input(logits), rows, classes, input(targets), with);
    else return 0;
}

template <class Logit, class Target, class Gradient>
void backward(const Logit* logits, std::size_t rows, std::size_t classes, const Target* targets, const double* lse,
              Gradient* grad, const options& with = {}) {
    if constexpr (detail::check_types<Logit, Target, Gradient>())
        backward(input(logits), rows, classes, input(targets), lse, output(grad), with);
}

template <class Logit, class Target, class Gradient>
void backward_targets(const Logit* logits, std::size_t rows, std::size_t classes, const Target* targets,
                      const double* lse, Gradient* grad_targets, const options& with = {}) {
    if constexpr (detail::check_target_types<Logit, Target, Gradient>())
        backward_targets(input(logits), rows, classes, input(targets), lse, output(grad_targets), with);
}

template <class Logit, class Target, class Gradient>
double forward_backward(const Logit* logits, std::size_t rows, std::size_t classes, const Target* targets,
                        Gradient* grad, const options& with = {}) {
    if constexpr (detail::check_types<Logit, Target, Gradient>())
        return forward_backward(input(logits), rows, classes, input(targets), output(grad), with);
    else return 0;
}

template <class From, class To>
void softmax(const From* from, std::size_t rows, std::size_t classes, To* to, const softmax_options& with = {}) {
    if constexpr (detail::check_family<To, From>()) softmax(input(from), rows, classes, output(to), with);
}

template <class Value, class GradY, class GradX>
void softmax_backward(const Value* values, std::size_t rows, std::size_t classes, const GradY* grad_y, GradX* grad_x,
                      const softmax_options& with = {}) {
    if constexpr (detail::check_family<GradX, Value, GradY>())
        softmax_backward(input(values), rows, classes, input(grad_y), output(grad_x), with);
}

template <class From, class To>
void log_softmax(const From* from, std::size_t rows, std::size_t classes, To* to, const softmax_options& with = {}) {
    if constexpr (detail::check_family<To, From>()) log_softmax(input(from), rows, classes, output(to), with);
}

template <class Value, class GradY, class GradX>
void log_softmax_backward(const Value* values, std::size_t rows, std::size_t classes, const GradY* grad_y, GradX* grad_x,
                      const softmax_options& with = {}) {
    if constexpr (detail::check_family<GradX, Value, GradY>())
        log_softmax_backward(input(values), rows, classes, input(grad_y), output(grad_x), with);
}

// ---- containers and matrices; sizes and shapes checked ----------------------------------------
// rows are those of the logits if they are a matrix; else targets.size() (divided by options.inner) for
// class indices, logits.size() / classes for probabilities and where there are no targets.

template <class Logits, class Targets, class = detail::if_operands<Logits, Targets>>
double forward(const Logits& logits, std::size_t classes, const Targets& targets, const options& with = {}) {
    if constexpr (detail::check_operands<const Logits, const Targets>())
        return forward(input(logits), detail::rows_of(logits, classes, targets, with.inner), classes, input(targets),
                       with);
    else return 0;
}

template <class Logits, class Targets, class = detail::if_operands<Logits, Targets>>
void forward(const Logits& logits, std::size_t classes, const Targets& targets, const results& out,
             const options& with = {}) {
    if constexpr (detail::check_operands<const Logits, const Targets>())
        forward(input(logits), detail::rows_of(logits, classes, targets, with.inner), classes, input(targets), out,
                with);
}

template <class Logits, class = detail::if_operands<Logits>>
void evaluate(const Logits& logits, std::size_t classes, const results& out, const options& with = {}) {
    if constexpr (detail::check_memory<const Logits>()) {
        if constexpr (detail::check_logits<detail::element_of<const Logits>>())
            evaluate(input(logits), detail::rows_of_logits(logits, classes, with.inner), classes, out, with);
    }
}

template <class Logits, class Targets, class Lse, class Gradient,
          class = detail::if_operands<Logits, Targets, Lse, Gradient>>
void backward(const Logits& logits, std::size_t classes, const Targets& targets, const Lse& lse, Gradient&& grad,
              const options& with = {}) {
    if constexpr (detail::check_operands<const Logits, const Targets, Gradient>() && detail::check_lse<const Lse>()) {
        const std::size_t rows = detail::rows_of(logits, classes, targets, with.inner);
        backward(input(logits), rows, classes, input(targets), detail::lse_of(lse, rows, with), output(grad), with);
    }
}

template <class Logits, class Targets, class Lse, class Gradient,
          class = detail::if_operands<Logits, Targets, Lse, Gradient>>
void backward_targets(const Logits& logits, std::size_t classes, const Targets& targets, const Lse& lse,
                      Gradient&& grad_targets, const options& with = {}) {
    if constexpr (detail::check_target_operands<const Logits, const Targets, Gradient>() &&
                  detail::check_lse<const Lse>()) {
        const std::size_t rows = detail::rows_of(logits, classes, targets, with.inner);
        backward_targets(input(logits), rows, classes, input(targets), detail::lse_of(lse, rows, with),
                         output(grad_targets), with);
    }
}

template <class Logits, class Targets, class Gradient, class = detail::if_operands<Logits, Targets, Gradient>>
double forward_backward(const Logits& logits, std::size_t classes, const Targets& targets, Gradient&& grad,
                        const options& with = {}) {
    if constexpr (detail::check_operands<const Logits, const Targets, Gradient>())
        return forward_backward(input(logits), detail::rows_of(logits, classes, targets, with.inner), classes,
                                input(targets), output(grad), with);
    else return 0;
}

template <class Logits, class Targets, class Gradient, class = detail::if_operands<Logits, Targets, Gradient>>
void forward_backward(const Logits& logits, std::size_t classes, const Targets& targets, const results& out,
                      Gradient&& grad, const options& with = {}) {
    if constexpr (detail::check_operands<const Logits, const Targets, Gradient>())
        forward_backward(input(logits), detail::rows_of(logits, classes, targets, with.inner), classes, input(targets),
                         out, output(grad), with);
}

// Of shards, the rows are those of the states.

template <class Logits, class Targets, class States, class = detail::if_operands<Logits, Targets, States>>
void partial_forward(const Logits& logits, std::size_t classes, const Targets& targets, std::size_t class_offset,
                     std::size_t total_classes, States&& partials, const options& with = {}) {
    if constexpr (detail::check_operands<const Logits, const Targets>())
        partial_forward(input(logits), detail::rows_of_states("partials", partials, with.inner), classes,
                        input(targets), class_offset, total_classes, detail::states_of(partials), with);
}

template <class Into, class From, class = detail::if_operands<Into, From>>
void partial_merge(Into&& into, const From& from) {
    const auto size = static_cast<std::size_t>(std::size(from));
    if (static_cast<std::size_t>(std::size(into)) != size)
        detail::size_error("into", static_cast<std::size_t>(std::size(into)), size, "", ": one for each state of from");
    partial_merge(detail::states_of(into), detail::states_of(from), size);
}

template <class Targets, class States, class = detail::if_operands<Targets, States>>
double partial_finish(const Targets& targets, std::size_t total_classes, const States& merged,
                      const options& with = {}) {
    return partial_finish(detail::rows_of_states("merged", merged, with.inner), input(targets), total_classes,
                          detail::states_of(merged), with);
}

template <class Targets, class States, class = detail::if_operands<Targets, States>>
void partial_finish(const Targets& targets, std::size_t total_classes, const States& merged, const results& out,
                    const options& with = {}) {
    partial_finish(detail::rows_of_states("merged", merged, with.inner), input(targets), total_classes,
                   detail::states_of(merged), out, with);
}

template <class Logits, class Targets, class States, class Gradient,
          class = detail::if_operands<Logits, Targets, States, Gradient>>
void partial_backward(const Logits& logits, std::size_t classes, const Targets& targets, std::size_t class_offset,
                      std::size_t total_classes, const States& merged, Gradient&& grad, const options& with = {}) {
    if constexpr (detail::check_operands<const Logits, const Targets, Gradient>())
        partial_backward(input(logits), detail::rows_of_states("merged", merged, with.inner), classes,
                         input(targets), class_offset, total_classes, detail::states_of(merged), output(grad), with);
}

template <class From, class To, class = detail::if_operands<From, To>>
void softmax(const From& from, std::size_t classes, To&& to, const softmax_options& with = {}) {
    detail::run_containers(xent_softmax, from, classes, to, with);
}

template <class Values, class GradY, class GradX, class = detail::if_operands<Values, GradY, GradX>>
void softmax_backward(const Values& values, std::size_t classes, const GradY& grad_y, GradX&& grad_x,
                      const softmax_options& with = {}) {
    detail::run_containers(xent_softmax_backward, values, classes, grad_y, grad_x, with);
}

template <class From, class To, class = detail::if_operands<From, To>>
void log_softmax(const From& from, std::size_t classes, To&& to, const softmax_options& with = {}) {
    detail::run_containers(xent_log_softmax, from, classes, to, with);
}

template <class Values, class GradY, class GradX, class = detail::if_operands<Values, GradY, GradX>>
void log_softmax_backward(const Values& values, std::size_t classes, const GradY& grad_y, GradX&& grad_x,
                      const softmax_options& with = {}) {
    detail::run_containers(xent_log_softmax_backward, values, classes, grad_y, grad_x, with);
}

// ---- about the library ----------------------------------------------------------------------

/// The kernels in use: "avx512", "avx2", "neon" or "portable". The environment variable XENT_ISA
/// can lower it.
inline const char* isa() noexcept { return xent_isa(); }

/// The most stack that a call takes on a thread, in bytes; at most 48 KiB.
inline std::size_t stack_bytes() noexcept { return xent_stack_bytes(); }

/// "0.1.0"
inline const char* version() noexcept { return xent_version(); }

#if defined(XENT_NO_EXCEPTIONS)
} // namespace without_exceptions
#endif
} // namespace xent

#undef XENT_HPP_VISIBLE

#endif // XENT_HPP
