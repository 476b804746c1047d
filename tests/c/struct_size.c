/* struct_size and flags: programs that are older or newer than the library. */
#include "check.h"

/* The members of the first release end here, in every later one too. */
static const uint32_t first_problem = (uint32_t)(offsetof(xent_problem, pool) + sizeof(void *));
static const uint32_t first_results = (uint32_t)(offsetof(xent_results, entropy) + sizeof(xent_output));

struct later_problem {
    xent_problem now;
    unsigned char tail[24];
};
struct later_results {
    xent_results now;
    unsigned char tail[24];
};

int main(void) {
    struct fixture f;
    fixture_init(&f);
    CHECK(f.problem.struct_size == sizeof(xent_problem));
    CHECK(f.results.struct_size == sizeof(xent_results));

    /* built by hand, not from XENT_*_INIT; cut short */
    const uint32_t short_problem[] = {0, 1, 4, first_problem / 2, first_problem - 1};
    const uint32_t short_results[] = {0, 1, 4, first_results / 2, first_results - 1};
    for (size_t k = 0; k < 5; k++) {
        fixture_init(&f);
        f.problem.struct_size = short_problem[k];
        FAILS(&f, EVERY_ENTRY, XENT_ERR_STRUCT, "problem", "struct_size");
        fixture_init(&f);
        f.results.struct_size = short_results[k];
        FAILS(&f, WITH_RESULTS, XENT_ERR_STRUCT, "results", "struct_size");
    }

    /* the size of the first release stays valid */
    fixture_init(&f);
    f.problem.struct_size = first_problem;
    f.results.struct_size = first_results;
    WORKS(&f, EVERY_ENTRY);

    /* a program newer than the library: accepted as long as it uses nothing new */
    struct later_problem problem;
    struct later_results results;
    fixture_init(&f);
    memset(&problem, 0, sizeof problem);
    memset(&results, 0, sizeof results);
    problem.now = f.problem;
    results.now = f.results;
    problem.now.struct_size = (uint32_t)sizeof problem;
    results.now.struct_size = (uint32_t)sizeof results;
    f.problem_arg = &problem.now;
    f.results_arg = &results.now;
    WORKS(&f, EVERY_ENTRY);
    for (size_t at = 0; at < sizeof problem.tail; at++) {
        problem.tail[at] = 1;
        FAILS(&f, EVERY_ENTRY, XENT_ERR_STRUCT, "problem");
        problem.tail[at] = 0;
        results.tail[at] = 0x80;
        FAILS(&f, WITH_RESULTS, XENT_ERR_STRUCT, "results");
        results.tail[at] = 0;
    }
    WORKS(&f, EVERY_ENTRY);

    /* flag bits this library does not know */
    for (int bit = 4; bit < 32; bit++) {
        fixture_init(&f);
        f.problem.flags = (uint32_t)1 << bit;
        FAILS(&f, EVERY_ENTRY, XENT_ERR_STRUCT, "flags");
    }
    return report();
}
