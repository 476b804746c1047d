/* A program that the tests of the installed library link in every way. It also says whether the headers' version
 * is the library's. */
#include <stdio.h>
#include <string.h>
#include <xent.h>

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
#define VERSION TEXT(XENT_VERSION_MAJOR) "." TEXT(XENT_VERSION_MINOR) "." TEXT(XENT_VERSION_PATCH)

enum { ROWS = 600, CLASSES = 1000 };

static float logits[ROWS * CLASSES];
static int32_t targets[ROWS];

int main(void) {
    double loss = 0;
    xent_problem problem = XENT_PROBLEM_INIT;
    xent_results results = XENT_RESULTS_INIT;
    xent_output grad = {logits, XENT_F32, {0, 0, 0}};
    problem.rows = ROWS;
    problem.classes = CLASSES;
    problem.logits.data = logits;
    problem.logits.dtype = XENT_F32;
    problem.targets.data = targets;
    problem.targets.dtype = XENT_I32;
    results.loss = &loss;
    /* Large enough for threads. */
    if (xent_forward_backward(&problem, NULL, 1.0, &results, &grad) != XENT_OK) {
        fprintf(stderr, "%s\n", xent_last_error());
        return 1;
    }
    double error = loss - 6.907755278982137; /* ln 1000 */
    if (!(error > -1e-6 && error < 1e-6) || strcmp(xent_version(), VERSION) != 0) {
        fprintf(stderr, "loss %.17g, version %s with headers of %s\n", loss, xent_version(), VERSION);
        return 1;
    }
    return 0;
}
