// Shared by the C++ tests: checks that say what failed.
#ifndef XENT_TESTS_CHECK_HPP
#define XENT_TESTS_CHECK_HPP

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>

#include "xent.hpp"

inline int failures = 0;

inline int report() { return failures == 0 ? 0 : 1; }

inline void check_true(const char* file, int line, bool ok, const char* what) {
    if (ok) return;
    ++failures;
    std::fprintf(stderr, "%s:%d: expected %s, got false\n", file, line, what);
}

inline void check_near(const char* file, int line, double got, double expected, double tolerance) {
    if (std::isnan(expected) ? std::isnan(got) : std::fabs(got - expected) <= tolerance) return;
    ++failures;
    std::fprintf(stderr, "%s:%d: expected %.17g within %.3g, got %.17g\n", file, line, expected, tolerance, got);
}

inline void check_text(const char* file, int line, const std::string& got, const std::string& expected) {
    if (got == expected) return;
    ++failures;
    std::fprintf(stderr, "%s:%d: expected \"%s\", got \"%s\"\n", file, line, expected.c_str(), got.c_str());
}

#if !defined(XENT_NO_EXCEPTIONS)
// The call has to throw xent::error with this status and this word in its message.
template <class Call>
void check_throws(const char* file, int line, xent_status status, const char* word, Call&& call) {
    try {
        call();
    } catch (const xent::error& e) {
        check_text(file, line, e.name(), xent_status_name(status));
        if (e.status() == status && std::strstr(e.what(), word)) return;
        ++failures;
        std::fprintf(stderr, "%s:%d: expected \"%s\" somewhere in \"%s\"\n", file, line, word, e.what());
        return;
    }
    ++failures;
    std::fprintf(stderr, "%s:%d: expected %s, got no exception\n", file, line, xent_status_name(status));
}
#endif

#define CHECK(condition) check_true(__FILE__, __LINE__, (condition), #condition)
#define CHECK_NEAR(got, expected, tolerance) check_near(__FILE__, __LINE__, (got), (expected), (tolerance))
#define CHECK_TEXT(got, expected) check_text(__FILE__, __LINE__, (got), (expected))
#define CHECK_THROWS(status, word, ...) \
    check_throws(__FILE__, __LINE__, (status), (word), [&] { __VA_ARGS__; })

// Whether the same memory reads the same, to the bit.
template <class A, class B>
bool same_bits(const A& a, const B& b) {
    return std::size(a) == std::size(b) && std::memcmp(std::data(a), std::data(b), std::size(a) * sizeof *std::data(a)) == 0;
}

#endif
