package sim

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
)

// MustRun fails with the last events when a seed breaks something.
func mustRun(tb testing.TB, cfg Config) *Report {
	tb.Helper()
	r, err := Run(cfg)
	var f *Failure
	if errors.As(err, &f) {
		tb.Fatalf("%s\n%v", strings.Join(f.Events, "\n"), f)
	}
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

func TestTry(t *testing.T) {
	seed, _ := strconv.ParseUint(os.Getenv("SEED"), 10, 64)
	n, _ := strconv.ParseUint(os.Getenv("N"), 10, 64)
	var c Coverage
	for s := seed; s <= seed+n; s++ {
		r := mustRun(t, Config{Seed: s})
		c.Add(r.Coverage)
		fmt.Println(s, r.Commands, r.Applied, r.Steps, r.Virtual, r.Coverage.Injected())
	}
	fmt.Printf("%+v\n", c)
	fmt.Println(c.Missing())
}
