package jobspec

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/rxvision/rxvision/cluster"
)

// Fault is one thing wrong with a job.
type Fault struct {
	// Path names the place as the HCL source would: group.web.task.x.driver,
	// constraint[1].operator. "job" is the job as a whole; empty when Text says
	// itself where (errors of the HCL parser).
	Path string
	// Line is the line of the source, 1 for the first, 0 when it is not known.
	Line int
	// Text says what is wrong and what would be right.
	Text string
}

// String renders the fault on one line: `group.web.count (line 3): must not be negative`.
func (f Fault) String() string {
	switch {
	case f.Path == "":
		return f.Text
	case f.Line == 0:
		return f.Path + ": " + f.Text
	default:
		return fmt.Sprintf("%s (line %d): %s", f.Path, f.Line, f.Text)
	}
}

// MaxFaults bounds how many faults of one job are spelt out; the rest are counted.
const MaxFaults = 100

// Faults is everything wrong with a job. It is the error that Parse and FromAPI
// return for a bad job; errors.As also finds a *cluster.Error with CodeInvalid in
// it.
type Faults []Fault

// Error implements error in the form that users of Nomad know:
//
//	2 errors occurred:
//		* group.web.count (line 3): must not be negative
//		* group.web.task.x.driver (line 7): unknown driver "dokcer"; known: …
func (fs Faults) Error() string {
	var b strings.Builder
	noun := "errors"
	if len(fs) == 1 {
		noun = "error"
	}
	fmt.Fprintf(&b, "%d %s occurred:\n", len(fs), noun)
	for i, f := range fs {
		if i == MaxFaults {
			fmt.Fprintf(&b, "\t* … and %d more\n", len(fs)-i)
			break
		}
		fmt.Fprintf(&b, "\t* %s\n", f)
	}
	b.WriteByte('\n')
	return b.String()
}

// As lets errors.As and cluster.CodeOf see the faults as a cluster.Error.
func (fs Faults) As(target any) bool {
	e, ok := target.(**cluster.Error)
	if ok {
		*e = cluster.Errorf(cluster.CodeInvalid, "%s", fs.Error())
	}
	return ok
}

// Strings renders each fault by itself, for answers that list them.
func (fs Faults) Strings() []string {
	out := make([]string, len(fs))
	for i, f := range fs {
		out[i] = f.String()
	}
	return out
}

// Annotate adds to the Faults in err the lines that their paths have in source, of
// format "hcl2" or "json" as a job submission names it. Any other error, and
// faults whose place the source does not show, come back as they are. The faults
// come back in the order of their lines. The source is only read, never evaluated;
// one that is too large or broken adds nothing.
func Annotate(err error, source, format string) error {
	var fs Faults
	if source == "" || !errors.As(err, &fs) {
		return err
	}
	return fs.At(positionsOf([]byte(source), format))
}

// At adds the lines of the faults' paths, as Annotate does, from the positions that
// Parse gave.
func (fs Faults) At(p Positions) Faults {
	out := make(Faults, len(fs))
	for i, f := range fs {
		if f.Line == 0 {
			f.Line = p.Line(f.Path)
		}
		out[i] = f
	}
	slices.SortStableFunc(out, func(a, b Fault) int { return cmp.Compare(a.Line, b.Line) })
	return out
}
