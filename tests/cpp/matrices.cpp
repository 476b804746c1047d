// Matrices with strides of their own, by their member functions: row-major, column-major and mdspans.
#include <vector>

// <complex.h> defines I; other headers define other letters, and programs x and y. libstdc++'s own headers break with
// e and s defined, so they come before.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#if __has_include(<version>)
#include <version>
#endif
#if defined(__cpp_lib_ranges)
#include <ranges>
#endif
#if defined(__cpp_lib_span)
#include <span>
#endif
#if defined(__cpp_lib_mdspan)
#include <array>
#include <mdspan>
#endif
#if defined(__STDCPP_BFLOAT16_T__) || defined(__STDCPP_FLOAT16_T__)
#include <stdfloat>
#endif
#include "../c/parts/define_letters.h"
#include "xent.hpp"
#include "../c/parts/undefine_letters.h"

#include "check.hpp"

// Debian installs Eigen under eigen3.
#if __has_include(<Eigen/Core>)
#include <Eigen/Core>
#define HAS_EIGEN 1
#elif __has_include(<eigen3/Eigen/Core>)
#include <eigen3/Eigen/Core>
#define HAS_EIGEN 1
#else
#define HAS_EIGEN 0
#endif

namespace {

// A matrix with the member functions of an Eigen matrix.
struct matrix {
    float* memory;
    std::size_t height, width;
    std::ptrdiff_t down, right;
    float* data() const { return memory; }
    std::size_t rows() const { return height; }
    std::size_t cols() const { return width; }
    std::size_t size() const { return height * width; }
    std::ptrdiff_t rowStride() const { return down; }
    std::ptrdiff_t colStride() const { return right; }
};

// With the member functions of others.
struct named : matrix {
    explicit named(const matrix& from) : matrix(from) {}
    std::ptrdiff_t rowStride() const = delete;
    std::ptrdiff_t row_stride() const { return down; }
    std::ptrdiff_t col_stride() const { return right; }
};
struct numbered {
    matrix held;
    float* data() const { return held.memory; }
    int rows() const { return static_cast<int>(held.height); }
    int cols() const { return static_cast<int>(held.width); }
    long stride(int axis) const { return axis == 0 ? held.down : held.right; }
};

// data() and size(), but neither iterators nor strides.
struct shapeless {
    std::vector<float> memory;
    const float* data() const { return memory.data(); }
    float* data() { return memory.data(); }
    std::size_t size() const { return memory.size(); }
};
struct unstrided : std::vector<float> {
    std::size_t rows() const { return 1; }
    std::size_t cols() const { return size(); }
};

// The interface of std::mdspan.
template <class Element>
struct span2 {
    using element_type = Element;
    using reference = Element&;
    Element* memory;
    std::size_t extents[2];
    std::ptrdiff_t strides_[2];
    static constexpr std::size_t rank() { return 2; }
    static constexpr bool is_always_strided() { return true; }
    Element* const& data_handle() const { return memory; }
    std::size_t extent(std::size_t axis) const { return extents[axis]; }
    std::ptrdiff_t stride(std::size_t axis) const { return strides_[axis]; }
};

static_assert(!std::is_convertible_v<shapeless&, xent::input> && !std::is_convertible_v<shapeless&, xent::output>);
static_assert(!std::is_convertible_v<unstrided&, xent::input>);
static_assert(std::is_convertible_v<matrix&, xent::input> && std::is_convertible_v<span2<float>, xent::output>);
static_assert(!std::is_convertible_v<span2<const float>, xent::output>);

constexpr std::size_t rows = 4, classes = 3;

} // namespace

int main() {
    std::vector<float> packed(rows * classes), gradient(rows * classes), column(rows * classes);
    for (std::size_t i = 0; i < packed.size(); ++i) packed[i] = 0.25f * static_cast<float>((i * 29) % 17) - 2;
    for (std::size_t row = 0; row < rows; ++row)
        for (std::size_t c = 0; c < classes; ++c) column[c * rows + row] = packed[row * classes + c];
    const std::vector<int> targets{2, 0, 1, 1};
    const double loss = xent::forward_backward(packed, classes, targets, gradient);

    std::vector<float> grad(rows * classes);
    auto is_transposed = [&] {
        bool same = true;
        for (std::size_t row = 0; row < rows; ++row)
            for (std::size_t c = 0; c < classes; ++c)
                same = same && std::fabs(grad[c * rows + row] - gradient[row * classes + c]) < 1e-6f;
        grad.assign(rows * classes, 7.0f);
        return same;
    };
    matrix by_column{column.data(), rows, classes, 1, rows}, to{grad.data(), rows, classes, 1, rows};
    CHECK_NEAR(xent::forward(by_column, classes, targets), loss, 1e-6);
    CHECK_NEAR(xent::forward_backward(by_column, classes, targets, to), loss, 1e-6);
    CHECK(is_transposed());
    const span2<const float> from_span{column.data(), {rows, classes}, {1, rows}};
    CHECK_NEAR(xent::forward_backward(from_span, classes, targets, span2<float>{grad.data(), {rows, classes}, {1, rows}}),
               loss, 1e-6);
    CHECK(is_transposed());
    named by_name(by_column), to_name(to);
    CHECK_NEAR(xent::forward_backward(by_name, classes, targets, to_name), loss, 1e-6);
    CHECK(is_transposed());
    numbered by_number{by_column}, to_number{to};
    CHECK_NEAR(xent::forward_backward(by_number, classes, targets, to_number), loss, 1e-6);
    CHECK(is_transposed());
#if defined(__cpp_lib_mdspan)
    using columns = std::mdspan<float, std::dextents<int, 2>, std::layout_left>;
    const std::mdspan<const float, std::dextents<int, 2>, std::layout_left> view(column.data(), rows, classes);
    CHECK_NEAR(xent::forward_backward(view, classes, targets, columns(grad.data(), rows, classes)), loss, 1e-6);
    CHECK(is_transposed());
    using shape = std::dextents<std::size_t, 2>;
    const std::layout_stride::mapping<shape> mapping(shape(rows, classes), std::array<std::size_t, 2>{1, rows});
    const std::mdspan<const float, shape, std::layout_stride> strided(column.data(), mapping);
    CHECK_NEAR(xent::forward(strided, classes, targets), loss, 1e-6);
#endif
    matrix one{column.data(), rows, classes, 0, 0}, wrong{column.data(), classes, rows, 1, classes};
    CHECK_THROWS(XENT_ERR_STRIDE, "logits has the stride 0", xent::forward(one, classes, targets));
    CHECK_THROWS(XENT_ERR_SHAPE, "logits is 3 x 4, needs 3 x 3", xent::forward(wrong, classes, targets));

    const std::vector<float> labels(rows);
    CHECK_THROWS(XENT_ERR_SHAPE, "class indices are std::int64_t", xent::forward(packed, classes, labels));

#if HAS_EIGEN
    using by_rows = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    const Eigen::MatrixXf logits = Eigen::Map<const Eigen::MatrixXf>(column.data(), rows, classes);
    const Eigen::VectorXi y = Eigen::Map<const Eigen::VectorXi>(targets.data(), rows);
    const Eigen::MatrixXf expected = Eigen::Map<const by_rows>(gradient.data(), rows, classes);
    CHECK_NEAR(xent::forward(logits, classes, y), loss, 1e-6);
    CHECK_NEAR(xent::forward(by_rows(logits), classes, targets), loss, 1e-6);
    Eigen::MatrixXf big = Eigen::MatrixXf::Constant(rows, 9, 7.0f);
    CHECK_NEAR(xent::forward_backward(logits, classes, y, big.middleCols(5, 3)), loss, 1e-6);
    CHECK(big.middleCols(5, 3).isApprox(expected) && (big.leftCols(5).array() == 7).all() && (big.rightCols(1).array() == 7).all());
    const Eigen::Map<const Eigen::MatrixXf> map(column.data(), rows, classes);
    const Eigen::Ref<const Eigen::MatrixXf> some = big.middleCols(5, 3);
    CHECK_NEAR(xent::forward(map, classes, y), loss, 1e-6);
    CHECK_NEAR(xent::forward(some, classes, y), xent::forward(Eigen::MatrixXf(some), classes, y), 0);
    Eigen::MatrixXf apart = Eigen::MatrixXf::Constant(2 * rows, classes, 7.0f);
    Eigen::Map<Eigen::MatrixXf, 0, Eigen::Stride<Eigen::Dynamic, 2>> every_other(
        apart.data(), rows, classes, Eigen::Stride<Eigen::Dynamic, 2>(2 * rows, 2));
    CHECK_NEAR(xent::forward_backward(map, classes, y, every_other), loss, 1e-6);
    CHECK(every_other.isApprox(expected) && apart.sum() != 7.0f * static_cast<float>(apart.size()) && apart(1, 0) == 7);
    Eigen::MatrixXf whole = Eigen::MatrixXf::Zero(rows, classes);
    Eigen::Ref<Eigen::MatrixXf> part = whole;
    CHECK_NEAR(xent::forward_backward(map, classes, y, part), loss, 1e-6);
    CHECK(whole.isApprox(expected));
    Eigen::VectorXd lse(rows);
    xent::results out;
    out.lse = lse.data();
    xent::forward(logits, classes, y, out);
    Eigen::MatrixXf wide(classes, rows);
    xent::backward(logits, classes, y, lse, wide.transpose());
    CHECK(wide.transpose().isApprox(expected, 1e-5f));
    const Eigen::MatrixXf twos = Eigen::MatrixXf::Constant(2, rows, 2.0f);
    xent::options options;
    options.row_weights = twos.row(0);
    CHECK_NEAR(xent::forward(logits, classes, y, options), loss, 1e-6);
    const Eigen::Matrix<Eigen::bfloat16, Eigen::Dynamic, Eigen::Dynamic> bf16 = logits.cast<Eigen::bfloat16>();
    const Eigen::Matrix<Eigen::half, Eigen::Dynamic, Eigen::Dynamic> f16 = logits.cast<Eigen::half>();
    static_assert(xent::dtype_of<Eigen::bfloat16> == XENT_BF16 && xent::dtype_of<Eigen::half> == XENT_F16);
    static_assert(!std::is_convertible_v<Eigen::MatrixXf, xent::input>);
    CHECK_NEAR(xent::forward(bf16, classes, y), loss, 1e-2);
    CHECK_NEAR(xent::forward(f16, classes, y), loss, 1e-2);
#else
    std::puts("skipped: no Eigen");
#endif
    return report();
}
