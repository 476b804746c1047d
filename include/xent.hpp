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
//     evaluate           what there is without targets: lse, argmax, entropy
//
// softmax and log_softmax by themselves, and softmax_backward, log_softmax_backward. Each call in
// several forms:
//
//     (logits, classes, targets, ...)         containers: vectors, arrays, spans. rows = targets.size();
//                                             every size is checked
//     (logits, rows, classes, targets, ...)   pointers to packed memory
//                                             ... or views, where strides or other layouts are wanted
//     (..., results{...}, ...)                more than the loss: row losses, lse, counts, predictions
//
// Shapes     Logits and their gradient are [rows, classes], row by row unless a view carries strides;
//            everything that belongs to a row is [rows], what belongs to a class is [classes]. With
//            options.inner = K they are [rows, classes, K] and [rows, K], as in segmentation.
// Types      Deduced from the element: float, double, xent::bf16, xent::f16 (and std::bfloat16_t,
//            std::float16_t where the standard has them) for logits. A gradient has the type of the
//            logits, or float if they are halves.
// Targets    std::int64_t, std::int32_t, std::uint32_t, std::uint16_t, std::uint8_t are class indices,
//            [rows]; a floating type, any of those above, means probabilities, as many as logits.
// Errors     Every failure throws xent::error, with the status and a message that names the operand,
//            the index and the value: "targets[17] = 50257 is outside [0, 50257)". Nothing has then been
//            written: not one byte of a gradient, a result or, in place, the logits.
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
#include <iterator>
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
#if defined(__STDCPP_BFLOAT16_T__) || defined(__STDCPP_FLOAT16_T__)
#include <stdfloat>
#endif

#include "xent.h"

namespace xent {

// ---- errors ---------------------------------------------------------------------------------

/// What every failing call throws. what() says which operand, which index, which value.
class error : public std::runtime_error {
public:
    error(xent_status status, const std::string& message) : std::runtime_error(message), status_(status) {}

    /// XENT_ERR_TARGET and the like.
    xent_status status() const noexcept { return status_; }
    /// "XENT_ERR_TARGET" and the like.
    const char* name() const noexcept { return xent_status_name(status_); }

private:
    xent_status status_;
};

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
template <class T>
const bf16* as_bf16(const T* data) noexcept {
    static_assert(sizeof(T) == sizeof(bf16), "a bfloat16 has two bytes");
    return reinterpret_cast<const bf16*>(data);
}
template <class T, class = std::enable_if_t<!std::is_const_v<T>>>
bf16* as_bf16(T* data) noexcept {
    static_assert(sizeof(T) == sizeof(bf16), "a bfloat16 has two bytes");
    return reinterpret_cast<bf16*>(data);
}
template <class T>
const f16* as_f16(const T* data) noexcept {
    static_assert(sizeof(T) == sizeof(f16), "a half has two bytes");
    return reinterpret_cast<const f16*>(data);
}
template <class T, class = std::enable_if_t<!std::is_const_v<T>>>
f16* as_f16(T* data) noexcept {
    static_assert(sizeof(T) == sizeof(f16), "a half has two bytes");
    return reinterpret_cast<f16*>(data);
}

namespace detail {

inline constexpr xent_dtype no_dtype = 0xffffffffu;

template <class T>
constexpr xent_dtype find_dtype() {
    if constexpr (std::is_same_v<T, float>) return XENT_F32;
    else if constexpr (std::is_same_v<T, double>) return XENT_F64;
    else if constexpr (std::is_same_v<T, bf16>) return XENT_BF16;
    else if constexpr (std::is_same_v<T, f16>) return XENT_F16;
#if defined(__STDCPP_BFLOAT16_T__)
    else if constexpr (std::is_same_v<T, std::bfloat16_t>) return XENT_BF16;
#endif
#if defined(__STDCPP_FLOAT16_T__)
    else if constexpr (std::is_same_v<T, std::float16_t>) return XENT_F16;
#endif
    // long and long long are both 64 bits somewhere, and only one of them is std::int64_t
    else if constexpr (std::is_same_v<T, long> || std::is_same_v<T, long long> || std::is_same_v<T, int>)
        return sizeof(T) == 8 ? XENT_I64 : sizeof(T) == 4 ? XENT_I32 : no_dtype;
    else if constexpr (std::is_same_v<T, std::uint32_t>) return XENT_U32;
    else if constexpr (std::is_same_v<T, std::uint16_t>) return XENT_U16;
    // a row mask is often an array of bool
    else if constexpr (std::is_same_v<T, std::uint8_t> || (std::is_same_v<T, bool> && sizeof(bool) == 1))
        return XENT_U8;
    else return no_dtype;
}

} // namespace detail

/// Whether T can be the element of an operand.
template <class T>
inline constexpr bool is_element = detail::find_dtype<std::remove_cv_t<T>>() != detail::no_dtype;

/// The XENT_* dtype of an element type.
template <class T>
inline constexpr xent_dtype dtype_of = detail::find_dtype<std::remove_cv_t<T>>();

template <class T>
inline constexpr bool is_float_element = is_element<T> && dtype_of<T> <= XENT_F16;
template <class T>
inline constexpr bool is_index_element = is_element<T> && dtype_of<T> >= XENT_I64;

namespace detail {

// The element type of anything with data() and size(): vectors, arrays, spans. An rvalue is taken
// only if it is a view, since what it points to has to outlive an options object.
template <class C, class = void>
struct container {
    static constexpr bool ok = false;
    using element = void;
};
template <class C>
struct container<C, std::void_t<decltype(std::data(std::declval<C&>())), decltype(std::size(std::declval<C&>()))>> {
    using element = std::remove_pointer_t<decltype(std::data(std::declval<C&>()))>;
    static constexpr bool ok = is_element<element>;
};

template <class C>
inline constexpr bool outlives_call = std::is_lvalue_reference_v<C>
#if defined(__cpp_lib_ranges)
                                      || std::ranges::borrowed_range<C>
#endif
    ;

template <class C>
inline constexpr bool is_input_container = container<std::remove_reference_t<C>>::ok;
template <class C>
inline constexpr bool is_output_container =
    is_input_container<C> && !std::is_const_v<typename container<std::remove_reference_t<C>>::element>;

inline constexpr std::size_t unknown_size = static_cast<std::size_t>(-1);

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
    template <class R, class C = int, class I = int,
              class = std::enable_if_t<std::is_integral_v<R> && std::is_integral_v<C> && std::is_integral_v<I>>>
    constexpr strides(R row_, C classes_ = 1, I inner_ = 1) noexcept
        : row(static_cast<std::int64_t>(row_)),
          classes(static_cast<std::int64_t>(classes_)),
          inner(static_cast<std::int64_t>(inner_)) {}
};

/// Memory a call reads. Made from a pointer (packed), a pointer and strides, or a container, whose
/// size is then checked: exactly what is needed if packed, enough if strided. Default: absent.
class input {
public:
    input() noexcept = default;
    input(std::nullptr_t) noexcept {}

    template <class T, class = std::enable_if_t<is_element<T>>>
    input(const T* data) noexcept : view_{data, dtype_of<T>, {0, 0, 0}} {}

    template <class T, class = std::enable_if_t<is_element<T>>>
    input(const T* data, strides by) noexcept : view_{data, dtype_of<T>, {by.row, by.classes, by.inner}} {}

    template <class C, class = std::enable_if_t<detail::is_input_container<C> && detail::outlives_call<C>>>
    input(C&& container) noexcept : input(std::data(container)) {
        size_ = std::size(container);
    }

    template <class C, class = std::enable_if_t<detail::is_input_container<C> && detail::outlives_call<C>>>
    input(C&& container, strides by) noexcept : input(std::data(container), by) {
        size_ = std::size(container);
    }

    const xent_input& view() const noexcept { return view_; }
    /// How many elements there are to read; SIZE_MAX if that is not known.
    std::size_t size() const noexcept { return size_; }
    /// The default, a null pointer, or nullptr. (An empty container is present, with size 0.)
    bool absent() const noexcept { return view_.data == nullptr && size_ == detail::unknown_size; }

private:
    xent_input view_{nullptr, XENT_F32, {0, 0, 0}};
    std::size_t size_ = detail::unknown_size;
};

/// Memory a call writes. As input, but no two of its elements may share an address.
class output {
public:
    output() noexcept = default;
    output(std::nullptr_t) noexcept {}

    template <class T, class = std::enable_if_t<is_element<T> && !std::is_const_v<T>>>
    output(T* data) noexcept : view_{data, dtype_of<T>, {0, 0, 0}} {}

    template <class T, class = std::enable_if_t<is_element<T> && !std::is_const_v<T>>>
    output(T* data, strides by) noexcept : view_{data, dtype_of<T>, {by.row, by.classes, by.inner}} {}

    template <class C, class = std::enable_if_t<detail::is_output_container<C> && detail::outlives_call<C>>>
    output(C&& container) noexcept : output(std::data(container)) {
        size_ = std::size(container);
    }

    template <class C, class = std::enable_if_t<detail::is_output_container<C> && detail::outlives_call<C>>>
    output(C&& container, strides by) noexcept : output(std::data(container), by) {
        size_ = std::size(container);
    }

    const xent_output& view() const noexcept { return view_; }
    std::size_t size() const noexcept { return size_; }
    bool absent() const noexcept { return view_.data == nullptr && size_ == detail::unknown_size; }

private:
    xent_output view_{nullptr, XENT_F32, {0, 0, 0}};
    std::size_t size_ = detail::unknown_size;
};

// ---- the pool -------------------------------------------------------------------------------

/// Threads of the caller's own, instead of the one pool of the process. Move-only; an options object
/// that points to it must not outlive it. One that was moved from stands for the pool of the process.
class pool {
public:
    /// 0 = as many threads as there are processors. Throws xent::error (XENT_ERR_PARAM) if they
    /// cannot be had.
    explicit pool(std::uint32_t threads = 0) : handle_(xent_pool_new(threads)) {
        if (!handle_) throw error(XENT_ERR_PARAM, xent_last_error());
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
    double z_normalizer = 0;          ///< ... and that of the z-loss part
    double z_loss = 0;                ///< lambda of lambda * lse^2, added to each row's loss
    double softcap = 0;               ///< x -> cap * tanh(x / cap), after logit_scale; 0 = off
    double logit_scale = 1;           ///< x -> scale * x; > 0: 1 / temperature
    bool log_probs = false;           ///< the "logits" are log-probabilities: NLLLoss; there is no lse then
    bool empty_is_zero = false;       ///< the mean over no kept rows is 0 instead of NaN
    bool accumulate = false;          ///< add to the gradient instead of overwriting it

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
};

/// What a forward is to hand back besides, or instead of, its return value. Null = not wanted; all
/// of it comes from one pass over the logits. Without targets: lse, argmax, entropy.
struct results {
    double* loss = nullptr;            ///< the reduced loss; not with reduction::none
    output row_losses{};               ///< float or double [rows]; 0 where ignored
    double* lse = nullptr;             ///< [rows]: log-sum-exp of each row's logits, what backward takes
    double* z_loss = nullptr;          ///< the z-loss part of the loss; not with reduction::none
    double* normalizer = nullptr;      ///< what a mean divides by, whatever the reduction
    double* z_normalizer = nullptr;    ///< ... for the z-loss part
    std::uint64_t* kept_rows = nullptr; ///< rows that count
    std::int64_t* argmax = nullptr;    ///< [rows]: the predicted class; the lowest of several
    std::uint64_t* correct = nullptr;  ///< kept rows whose predicted class is the target; index targets only
    output entropy{};                  ///< float or double [rows]: entropy of the softmax
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
    if (status != XENT_OK) throw error(status, xent_last_error());
}

[[noreturn]] inline void size_error(const char* name, std::size_t has, std::size_t needs, const char* how) {
    throw error(XENT_ERR_SHAPE, std::string(name) + " has " + std::to_string(has) + " elements, needs " + how +
                                    std::to_string(needs));
}

// A product no container can have the size of where it overflows: xent.h reports that itself.
inline std::size_t times(std::size_t a, std::size_t b) noexcept {
    return b != 0 && a > unknown_size / b ? unknown_size : a * b;
}

// The size of a container against the elements a call touches. What is wrong with the strides
// themselves is left for xent.h to say.
template <class View>
void check_size(const char* name, const View& view, std::size_t size, std::size_t rows, std::size_t classes,
                std::size_t inner) {
    if (size == unknown_size) return;
    const std::size_t sizes[3] = {rows, classes, inner};
    std::size_t packed = times(times(rows, classes), inner);
    if (packed == unknown_size) return;
    bool strided = false;
    for (int axis = 0; axis < 3; ++axis) strided = strided || (sizes[axis] > 1 && view.strides[axis] != 0);
    if (!strided) {
        if (size != packed) size_error(name, size, packed, "");
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
    if (size < extent) size_error(name, size, extent, "at least ");
}

struct call {
    xent_problem problem = XENT_PROBLEM_INIT;
    const options& with;

    call(const input& logits, std::size_t rows, std::size_t classes, const input& targets, const options& o)
        : with(o) {
        problem.flags = (o.log_probs ? std::uint32_t{XENT_FLAG_LOG_PROBS} : 0u) |
                        (o.empty_is_zero ? std::uint32_t{XENT_FLAG_EMPTY_IS_ZERO} : 0u) |
                        (o.accumulate ? std::uint32_t{XENT_FLAG_ACCUMULATE} : 0u);
        problem.rows = rows;
        problem.classes = classes;
        problem.inner = o.inner;
        problem.logits = logits.view();
        problem.targets = targets.view();
        problem.class_weights = o.class_weights.view();
        problem.row_weights = o.row_weights.view();
        problem.row_mask = o.row_mask.view();
        problem.ignore_index = o.ignore_index;
        problem.label_smoothing = o.label_smoothing;
        problem.z_loss = o.z_loss;
        problem.softcap = o.softcap;
        problem.logit_scale = o.logit_scale;
        problem.normalizer = o.normalizer;
        problem.z_normalizer = o.z_normalizer;
        problem.reduction = static_cast<xent_reduction>(o.reduction);
        problem.threads = o.threads;
        problem.pool = o.pool ? o.pool->get() : nullptr;
        check_size("logits", problem.logits, logits.size(), rows, classes, o.inner);
        // probabilities are as wide as the logits
        check_size("targets", problem.targets, targets.size(), rows,
                   problem.targets.dtype <= XENT_F16 ? classes : 1, o.inner);
        check_size("class_weights", problem.class_weights, o.class_weights.size(), 1, classes, 1);
        check_size("row_weights", problem.row_weights, o.row_weights.size(), rows, 1, o.inner);
        check_size("row_mask", problem.row_mask, o.row_mask.size(), rows, 1, o.inner);
    }

    xent_results to_fill(const results& r) const {
        xent_results c = XENT_RESULTS_INIT;
        c.loss = r.loss;
        c.row_losses = r.row_losses.view();
        c.lse = r.lse;
        c.z_loss = r.z_loss;
        c.normalizer = r.normalizer;
        c.z_normalizer = r.z_normalizer;
        c.kept_rows = r.kept_rows;
        c.argmax = r.argmax;
        c.correct = r.correct;
        c.entropy = r.entropy.view();
        check_size("row_losses", c.row_losses, r.row_losses.size(), problem.rows, 1, problem.inner);
        check_size("entropy", c.entropy, r.entropy.size(), problem.rows, 1, problem.inner);
        return c;
    }

    const xent_input* grad_output() const {
        bool per_row = problem.reduction == XENT_NONE;
        check_size("grad_output", with.grad_output.view(), with.grad_output.size(), per_row ? problem.rows : 1, 1,
                   per_row ? problem.inner : 1);
        return with.grad_output.absent() ? nullptr : &with.grad_output.view();
    }

    const xent_output* gradient(const char* name, const output& grad) const {
        check_size(name, grad.view(), grad.size(), problem.rows, problem.classes, problem.inner);
        return &grad.view();
    }
};

inline void need_reduced_loss(const options& with) {
    if (with.reduction == reduction::none)
        throw error(XENT_ERR_PARAM, "reduction::none has no loss to return: ask for results.row_losses");
}

// What the types alone can tell is told by the compiler.
template <class T, class I>
constexpr void check_types() {
    static_assert(is_float_element<T>, "logits are float, double, xent::bf16 or xent::f16");
    static_assert(is_index_element<I> || is_float_element<I>,
                  "targets are class indices (std::int64_t, int32_t, uint32_t, uint16_t, uint8_t) or probabilities");
}
template <class T, class I, class G>
constexpr void check_types() {
    check_types<T, I>();
    static_assert(!std::is_const_v<G>, "the gradient is written");
    static_assert(std::is_same_v<std::remove_const_t<T>, G> || std::is_same_v<G, float>,
                  "the gradient has the type of the logits, or float");
}

template <class T, class I, class G>
constexpr void check_target_types() {
    check_types<T, I>();
    static_assert(is_float_element<I>, "class indices have no gradient: targets are probabilities");
    static_assert(!std::is_const_v<G> && is_float_element<G>, "the gradient is written: float, double or a half");
}

template <class A, class... B>
constexpr void check_family_types() {
    static_assert(is_float_element<A>, "operands are float, double, xent::bf16 or xent::f16");
    static_assert((std::is_same_v<std::remove_const_t<A>, std::remove_const_t<B>> && ...),
                  "all operands of a call have one type");
}

template <class C>
using element_of = typename container<std::remove_reference_t<C>>::element;

template <class... C>
using if_inputs = std::enable_if_t<(is_input_container<C> && ...)>;

template <class T>
std::size_t rows_of(std::size_t size, std::size_t classes, std::size_t inner) {
    std::size_t per_row = times(is_float_element<T> ? classes : 1, inner);
    return per_row == 0 ? 0 : size / per_row;
}

// Where options.log_probs leaves no lse, any container will do, an empty one too.
template <class S>
const double* lse_of(const S& lse, std::size_t rows, const options& with) {
    static_assert(dtype_of<element_of<const S>> == XENT_F64, "lse is double");
    if (!with.log_probs) check_size("lse", input(lse).view(), std::size(lse), rows, 1, with.inner);
    return std::data(lse);
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
    auto operand(const char* name, const Operand& operand) const {
        check_size(name, operand.view(), operand.size(), shape.rows, shape.classes, shape.inner);
        return &operand.view();
    }
};

using family_forward = xent_status (*)(const xent_shape*, const xent_input*, const xent_output*);
using family_backward = xent_status (*)(const xent_shape*, const xent_input*, const xent_input*, const xent_output*);

inline void run(family_forward function, const input& x, std::size_t rows, std::size_t classes, const output& y,
                const softmax_options& with) {
    family_call call(rows, classes, with);
    const xent_input* from = call.operand("x", x);
    check(function(&call.shape, from, call.operand("y", y)));
}

inline void run(family_backward function, const input& y, std::size_t rows, std::size_t classes, const input& grad_y,
                const output& grad_x, const softmax_options& with) {
    family_call call(rows, classes, with);
    const xent_input* from = call.operand("y", y);
    const xent_input* grad = call.operand("grad_y", grad_y);
    check(function(&call.shape, from, grad, call.operand("grad_x", grad_x)));
}

template <class X, class Y>
void run_containers(family_forward function, const X& x, std::size_t classes, Y& y, const softmax_options& with) {
    check_family_types<element_of<const X>, element_of<Y>>();
    static_assert(is_output_container<Y&>, "y is written");
    run(function, input(x), rows_of<element_of<const X>>(std::size(x), classes, with.inner), classes, output(y), with);
}

template <class Y, class D, class G>
void run_containers(family_backward function, const Y& y, std::size_t classes, const D& grad_y, G& grad_x,
                    const softmax_options& with) {
    check_family_types<element_of<const Y>, element_of<const D>, element_of<G>>();
    static_assert(is_output_container<G&>, "grad_x is written");
    run(function, input(y), rows_of<element_of<const Y>>(std::size(y), classes, with.inner), classes, input(grad_y),
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

/// Fills `out` with what there is without targets: lse, argmax, entropy.
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
    const xent_input* grad_output = call.grad_output();
    detail::check(xent_backward(&call.problem, lse, grad_output, with.grad_scale, call.gradient("grad_logits", grad)));
}

/// Writes (or adds) the gradient with respect to probability targets, for distillation:
/// r * (1 - eps) * w_c * (lse - x_c), times what the reduction multiplies with. `lse` as in backward;
/// `grad_targets` has any floating type and overlaps nothing else. Ignored rows get 0.
inline void backward_targets(const input& logits, std::size_t rows, std::size_t classes, const input& targets,
                             const double* lse, const output& grad_targets, const options& with = {}) {
    detail::call call(logits, rows, classes, targets, with);
    const xent_input* grad_output = call.grad_output();
    detail::check(xent_backward_targets(&call.problem, lse, grad_output, with.grad_scale,
                                        call.gradient("grad_targets", grad_targets)));
}

/// The gradient, and `out` filled.
inline void forward_backward(const input& logits, std::size_t rows, std::size_t classes, const input& targets,
                             const results& out, const output& grad, const options& with = {}) {
    detail::call call(logits, rows, classes, targets, with);
    xent_results filled = call.to_fill(out);
    const xent_input* grad_output = call.grad_output();
    detail::check(
        xent_forward_backward(&call.problem, grad_output, with.grad_scale, &filled, call.gradient("grad_logits", grad)));
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

/// y = softmax of x over the classes. x and y have one type (XENT_ERR_DTYPE) and any layout: any axis of any tensor.
/// y may be exactly x.
inline void softmax(const input& x, std::size_t rows, std::size_t classes, const output& y,
                    const softmax_options& with = {}) {
    detail::run(xent_softmax, x, rows, classes, y, with);
}

/// grad_x = y * (grad_y - sum of y * grad_y), with y what softmax gave. grad_x may be exactly y or
/// exactly grad_y.
inline void softmax_backward(const input& y, std::size_t rows, std::size_t classes, const input& grad_y,
                             const output& grad_x, const softmax_options& with = {}) {
    detail::run(xent_softmax_backward, y, rows, classes, grad_y, grad_x, with);
}

/// y = x - ln sum of exp x, as softmax.
inline void log_softmax(const input& x, std::size_t rows, std::size_t classes, const output& y,
                        const softmax_options& with = {}) {
    detail::run(xent_log_softmax, x, rows, classes, y, with);
}

/// grad_x = grad_y - exp(y) * sum of grad_y, with y what log_softmax gave; as softmax_backward.
inline void log_softmax_backward(const input& y, std::size_t rows, std::size_t classes, const input& grad_y,
                                 const output& grad_x, const softmax_options& with = {}) {
    detail::run(xent_log_softmax_backward, y, rows, classes, grad_y, grad_x, with);
}

// ---- pointers: packed, types checked by the compiler ----------------------------------------

template <class T, class I>
double forward(const T* logits, std::size_t rows, std::size_t classes, const I* targets,
               const options& with = {}) {
    detail::check_types<T, I>();
    return forward(input(logits), rows, classes, input(targets), with);
}

template <class T, class I, class G>
void backward(const T* logits, std::size_t rows, std::size_t classes, const I* targets, const double* lse, G* grad,
              const options& with = {}) {
    detail::check_types<T, I, G>();
    backward(input(logits), rows, classes, input(targets), lse, output(grad), with);
}

template <class T, class I, class G>
void backward_targets(const T* logits, std::size_t rows, std::size_t classes, const I* targets, const double* lse,
                      G* grad_targets, const options& with = {}) {
    detail::check_target_types<T, I, G>();
    backward_targets(input(logits), rows, classes, input(targets), lse, output(grad_targets), with);
}

template <class T, class I, class G>
double forward_backward(const T* logits, std::size_t rows, std::size_t classes, const I* targets, G* grad,
                        const options& with = {}) {
    detail::check_types<T, I, G>();
    return forward_backward(input(logits), rows, classes, input(targets), output(grad), with);
}

template <class T, class U>
void softmax(const T* x, std::size_t rows, std::size_t classes, U* y, const softmax_options& with = {}) {
    detail::check_family_types<T, U>();
    softmax(input(x), rows, classes, output(y), with);
}

template <class T, class D, class G>
void softmax_backward(const T* y, std::size_t rows, std::size_t classes, const D* grad_y, G* grad_x,
                      const softmax_options& with = {}) {
    detail::check_family_types<T, D, G>();
    softmax_backward(input(y), rows, classes, input(grad_y), output(grad_x), with);
}

template <class T, class U>
void log_softmax(const T* x, std::size_t rows, std::size_t classes, U* y, const softmax_options& with = {}) {
    detail::check_family_types<T, U>();
    log_softmax(input(x), rows, classes, output(y), with);
}

template <class T, class D, class G>
void log_softmax_backward(const T* y, std::size_t rows, std::size_t classes, const D* grad_y, G* grad_x,
                          const softmax_options& with = {}) {
    detail::check_family_types<T, D, G>();
    log_softmax_backward(input(y), rows, classes, input(grad_y), output(grad_x), with);
}

// ---- containers: vectors, arrays, spans; sizes checked --------------------------------------
// rows = targets.size() (divided by the classes for probabilities, by options.inner), or that of the
// logits where there are no targets.

template <class L, class I, class = detail::if_inputs<L, I>>
double forward(const L& logits, std::size_t classes, const I& targets, const options& with = {}) {
    detail::check_types<detail::element_of<const L>, detail::element_of<const I>>();
    std::size_t rows = detail::rows_of<detail::element_of<const I>>(std::size(targets), classes, with.inner);
    return forward(input(logits), rows, classes, input(targets), with);
}

template <class L, class I, class = detail::if_inputs<L, I>>
void forward(const L& logits, std::size_t classes, const I& targets, const results& out, const options& with = {}) {
    detail::check_types<detail::element_of<const L>, detail::element_of<const I>>();
    std::size_t rows = detail::rows_of<detail::element_of<const I>>(std::size(targets), classes, with.inner);
    forward(input(logits), rows, classes, input(targets), out, with);
}

template <class L, class = detail::if_inputs<L>>
void evaluate(const L& logits, std::size_t classes, const results& out, const options& with = {}) {
    detail::check_types<detail::element_of<const L>, int>();
    std::size_t rows = detail::rows_of<detail::element_of<const L>>(std::size(logits), classes, with.inner);
    evaluate(input(logits), rows, classes, out, with);
}

template <class L, class I, class S, class G, class = detail::if_inputs<L, I, S, G>>
void backward(const L& logits, std::size_t classes, const I& targets, const S& lse, G&& grad,
              const options& with = {}) {
    detail::check_types<detail::element_of<const L>, detail::element_of<const I>, detail::element_of<G>>();
    std::size_t rows = detail::rows_of<detail::element_of<const I>>(std::size(targets), classes, with.inner);
    backward(input(logits), rows, classes, input(targets), detail::lse_of(lse, rows, with), output(grad), with);
}

template <class L, class I, class S, class G, class = detail::if_inputs<L, I, S, G>>
void backward_targets(const L& logits, std::size_t classes, const I& targets, const S& lse, G&& grad_targets,
                      const options& with = {}) {
    detail::check_target_types<detail::element_of<const L>, detail::element_of<const I>, detail::element_of<G>>();
    std::size_t rows = detail::rows_of<detail::element_of<const I>>(std::size(targets), classes, with.inner);
    backward_targets(input(logits), rows, classes, input(targets), detail::lse_of(lse, rows, with),
                     output(grad_targets), with);
}

template <class L, class I, class G, class = detail::if_inputs<L, I, G>>
double forward_backward(const L& logits, std::size_t classes, const I& targets, G&& grad,
                        const options& with = {}) {
    detail::check_types<detail::element_of<const L>, detail::element_of<const I>, detail::element_of<G>>();
    std::size_t rows = detail::rows_of<detail::element_of<const I>>(std::size(targets), classes, with.inner);
    return forward_backward(input(logits), rows, classes, input(targets), output(grad), with);
}

template <class L, class I, class G, class = detail::if_inputs<L, I, G>>
void forward_backward(const L& logits, std::size_t classes, const I& targets, const results& out, G&& grad,
                      const options& with = {}) {
    detail::check_types<detail::element_of<const L>, detail::element_of<const I>, detail::element_of<G>>();
    std::size_t rows = detail::rows_of<detail::element_of<const I>>(std::size(targets), classes, with.inner);
    forward_backward(input(logits), rows, classes, input(targets), out, output(grad), with);
}

template <class X, class Y, class = detail::if_inputs<X, Y>>
void softmax(const X& x, std::size_t classes, Y&& y, const softmax_options& with = {}) {
    detail::run_containers(xent_softmax, x, classes, y, with);
}

template <class Y, class D, class G, class = detail::if_inputs<Y, D, G>>
void softmax_backward(const Y& y, std::size_t classes, const D& grad_y, G&& grad_x, const softmax_options& with = {}) {
    detail::run_containers(xent_softmax_backward, y, classes, grad_y, grad_x, with);
}

template <class X, class Y, class = detail::if_inputs<X, Y>>
void log_softmax(const X& x, std::size_t classes, Y&& y, const softmax_options& with = {}) {
    detail::run_containers(xent_log_softmax, x, classes, y, with);
}

template <class Y, class D, class G, class = detail::if_inputs<Y, D, G>>
void log_softmax_backward(const Y& y, std::size_t classes, const D& grad_y, G&& grad_x,
                          const softmax_options& with = {}) {
    detail::run_containers(xent_log_softmax_backward, y, classes, grad_y, grad_x, with);
}

// ---- about the library ----------------------------------------------------------------------

/// The kernels in use: "avx512", "avx2", "neon" or "portable". The environment variable XENT_ISA
/// can lower it.
inline const char* isa() noexcept { return xent_isa(); }

/// "0.1.0"
inline const char* version() noexcept { return xent_version(); }

} // namespace xent

#endif // XENT_HPP
