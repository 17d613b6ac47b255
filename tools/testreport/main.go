// Command testreport reads the stream of `go test -json` on its standard input and prints what a person wants to see of
// it: a line for each package, failures in full, the skipped tests with their reasons, the slowest tests and the totals.
// Lines that a test prints beginning with MEASURED or FIRST_ANSWER are figures, and are passed on.
//
// It exits with 1 when a test, package or build failed, or when a test never finished. With -strict (set by CI=true)
// a skip that the file given by -skips does not list fails too, so that a missing peer never looks like a green run.
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"
)

const (
	slowest       = 10
	maxOutput     = 4 << 20  // bytes kept of what one test, or one package outside its tests, prints
	maxLine       = 16 << 20 // bytes of one line of the stream
	modulePrefix  = "github.com/rxvision/rxvision/"
	cutNote       = "\n... output cut here by testreport ...\n"
	defaultReason = "no reason given"
)

func main() {
	skips := flag.String("skips", "", "file of skips that -strict allows, lines of `package TestName # reason`")
	strict := flag.Bool("strict", os.Getenv("CI") == "true", "fail on a skip that is not in -skips")
	flag.Parse()
	code, err := run(os.Stdin, os.Stdout, *skips, *strict)
	if err != nil {
		fmt.Fprintln(os.Stderr, "testreport:", err)
		code = 2
	}
	os.Exit(code)
}

func run(in io.Reader, out io.Writer, skipsFile string, strict bool) (int, error) {
	allowed := allowList{}
	if skipsFile != "" {
		f, err := os.Open(skipsFile)
		if err != nil {
			return 2, err
		}
		defer f.Close()
		if allowed, err = readSkips(f); err != nil {
			return 2, fmt.Errorf("%s: %w", skipsFile, err)
		}
	}
	r := newReport(out)
	if err := r.read(in); err != nil {
		return 2, err
	}
	return r.summary(allowed, strict), nil
}

// event is a line of `go test -json`, see `go doc test2json` and `go help buildjson`.
type event struct {
	Action      string
	Package     string
	ImportPath  string // of build-output and build-fail
	Test        string
	Elapsed     float64 // seconds
	Output      string
	FailedBuild string
}

// test is a test, subtest or example; name "" stands for the package itself, which owns the output outside its tests.
type test struct {
	pkg, name string
	result    string // pass, fail, skip; empty while it runs
	elapsed   time.Duration
	out       strings.Builder
	partial   string // the start of a line whose end has not come yet
	child     bool   // a subtest of it was seen
}

func (t *test) String() string { return strings.TrimSpace(short(t.pkg) + " " + t.name) }

type key struct{ pkg, name string }

type report struct {
	w      io.Writer
	tests  map[key]*test
	builds map[string]*strings.Builder // output of the compiler by import path
	stray  bool                        // the stream held a line that is no event
}

func newReport(w io.Writer) *report {
	return &report{w: w, tests: map[key]*test{}, builds: map[string]*strings.Builder{}}
}

func (r *report) read(in io.Reader) error {
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			r.stray = true
			fmt.Fprintln(r.w, lines.Text())
			continue
		}
		r.add(e)
	}
	return lines.Err()
}

func (r *report) add(e event) {
	switch e.Action {
	case "build-output", "build-fail":
		if r.builds[e.ImportPath] == nil {
			r.builds[e.ImportPath] = &strings.Builder{}
		}
		r.builds[e.ImportPath].WriteString(e.Output)
		return
	}
	t := r.test(e.Package, e.Test)
	switch e.Action {
	case "output":
		r.output(t, e.Output)
	case "pass", "fail", "skip":
		t.result, t.elapsed = e.Action, time.Duration(e.Elapsed*float64(time.Second))
		if e.Test == "" {
			r.packageDone(t, e.FailedBuild)
		} else if t.result == "pass" {
			t.out.Reset()
		}
	}
}

func (r *report) test(pkg, name string) *test {
	k := key{pkg, name}
	t := r.tests[k]
	if t == nil {
		t = &test{pkg: pkg, name: name}
		r.tests[k] = t
		if i := strings.LastIndexByte(name, '/'); i > 0 {
			r.test(pkg, name[:i]).child = true
		}
	}
	return t
}

// figure is a line that a test printed for the reader, by itself or through testing.T.Log.
var figure = regexp.MustCompile(`^\s*(?:\S+\.go:\d+: )?((?:MEASURED|FIRST_ANSWER) .*)`)

func (r *report) output(t *test, s string) {
	if line := t.partial + s; !strings.HasSuffix(s, "\n") {
		t.partial = line[:min(len(line), maxOutput)]
	} else {
		t.partial = ""
		if m := figure.FindStringSubmatch(strings.TrimSuffix(line, "\n")); m != nil {
			fmt.Fprintln(r.w, m[1])
		}
	}
	switch room := maxOutput - t.out.Len(); {
	case room >= len(s):
		t.out.WriteString(s)
	case room > 0:
		t.out.WriteString(s[:room] + cutNote) // room is below zero from now on
	}
}

// packageDone prints the package's line and everything known about its failures, while it is fresh.
func (r *report) packageDone(p *test, failedBuild string) {
	var ran int
	var bad []*test
	for _, t := range r.sorted() {
		if t.pkg != p.pkg || t.name == "" {
			continue
		}
		ran++
		if t.failed() {
			bad = append(bad, t)
		}
	}
	switch {
	case p.result == "skip":
		return // no test files
	case p.result == "pass":
		fmt.Fprintf(r.w, "ok    %-28s %4d tests %8.1fs\n", short(p.pkg), ran, p.elapsed.Seconds())
		return
	}
	fmt.Fprintf(r.w, "FAIL  %-28s %4d tests %8.1fs\n", short(p.pkg), ran, p.elapsed.Seconds())
	if failedBuild != "" {
		fmt.Fprintf(r.w, "\n=== build of %s failed\n", short(failedBuild))
		if b := r.builds[failedBuild]; b != nil {
			fmt.Fprint(r.w, b)
		}
	}
	for _, t := range bad {
		fmt.Fprintf(r.w, "\n=== %s %s\n%s", t, t.verdict(), &t.out)
	}
	fmt.Fprintf(r.w, "\n=== %s, outside its tests\n%s\n", short(p.pkg), &p.out)
}

// failed also holds for a test that was running when its package ended.
func (t *test) failed() bool { return t.result == "fail" || t.result == "" }

func (t *test) verdict() string {
	if t.result == "" {
		return "did not finish"
	}
	return fmt.Sprintf("failed after %.1fs", t.elapsed.Seconds())
}

// reason is what a skipped test printed, on one line.
func (t *test) reason() string {
	var lines []string
	for line := range strings.Lines(t.out.String()) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "=== ") || strings.HasPrefix(line, "--- SKIP") {
			continue
		}
		lines = append(lines, line)
	}
	return cmp.Or(strings.Join(lines, " "), defaultReason)
}

func (r *report) sorted() []*test {
	all := make([]*test, 0, len(r.tests))
	for _, t := range r.tests {
		all = append(all, t)
	}
	slices.SortFunc(all, func(a, b *test) int {
		return cmp.Or(cmp.Compare(a.pkg, b.pkg), cmp.Compare(a.name, b.name))
	})
	return all
}

// summary prints the end of the report and returns the exit status.
func (r *report) summary(allowed allowList, strict bool) int {
	var passed int
	var failed, skipped, leaves []*test
	for _, t := range r.sorted() {
		switch {
		case t.name == "" && !t.failed():
			continue
		case t.name == "" && r.blamed(t.pkg):
			continue // its tests are counted
		case t.failed():
			failed = append(failed, t)
		case t.result == "skip":
			skipped = append(skipped, t)
		default:
			passed++
		}
		if t.name != "" && !t.child {
			leaves = append(leaves, t)
		}
	}

	if len(leaves) > 0 {
		slices.SortStableFunc(leaves, func(a, b *test) int { return cmp.Compare(b.elapsed, a.elapsed) })
		fmt.Fprintf(r.w, "\nThe slowest tests\n")
		for _, t := range leaves[:min(slowest, len(leaves))] {
			fmt.Fprintf(r.w, "%8.1fs  %s\n", t.elapsed.Seconds(), t)
		}
	}
	unlisted := 0
	if len(skipped) > 0 {
		fmt.Fprintf(r.w, "\nSkipped\n")
		for _, t := range skipped {
			mark := ""
			if strict && !allowed.has(t) {
				unlisted++
				mark = "  <- not listed in the file of allowed skips"
			}
			fmt.Fprintf(r.w, "  %s: %s%s\n", t, t.reason(), mark)
		}
	}
	if len(failed) > 0 {
		fmt.Fprintf(r.w, "\nFailed (in full above)\n")
		for _, t := range failed {
			fmt.Fprintf(r.w, "  %s %s\n", t, t.verdict())
		}
	}

	fmt.Fprintln(r.w)
	bad := len(failed) > 0
	if unlisted > 0 {
		fmt.Fprintf(r.w, "%d skips are not listed: supply what they miss, or list them with a reason\n", unlisted)
		bad = true
	}
	if len(r.tests) == 0 {
		fmt.Fprintln(r.w, "no test ran")
		bad = true
	}
	if r.stray {
		fmt.Fprintln(r.w, "go test printed lines that are no test events (above)")
		bad = true
	}
	fmt.Fprintf(r.w, "%d passed, %d failed, %d skipped\n", passed, len(failed), len(skipped))
	if bad {
		return 1
	}
	return 0
}

// blamed reports whether a test of the package failed, so that the package needs no mention of its own.
func (r *report) blamed(pkg string) bool {
	for k, t := range r.tests {
		if k.pkg == pkg && k.name != "" && t.failed() {
			return true
		}
	}
	return false
}

func short(pkg string) string {
	if pkg+"/" == modulePrefix {
		return "."
	}
	return strings.TrimPrefix(pkg, modulePrefix)
}

// allowList holds the skips that are known, by short package name and test.
type allowList map[key]bool

// readSkips reads lines of `package TestName # reason`; the package is relative to the module, "." its root. Empty
// lines and lines that begin with # are comments. A line without a reason is an error.
func readSkips(in io.Reader) (allowList, error) {
	list := allowList{}
	lines := bufio.NewScanner(in)
	var faults []error
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		entry, reason, _ := strings.Cut(line, " # ")
		fields := strings.Fields(entry)
		if len(fields) != 2 || strings.TrimSpace(reason) == "" {
			faults = append(faults, fmt.Errorf("line %d: want `package TestName # reason`, have %q", n, line))
			continue
		}
		list[key{short(fields[0]), fields[1]}] = true
	}
	return list, errors.Join(append(faults, lines.Err())...)
}

// has reports whether the test, or a test that it is a subtest of, is listed.
func (a allowList) has(t *test) bool {
	for name := t.name; ; {
		if a[key{short(t.pkg), name}] {
			return true
		}
		i := strings.LastIndexByte(name, '/')
		if i < 0 {
			return false
		}
		name = name[:i]
	}
}
