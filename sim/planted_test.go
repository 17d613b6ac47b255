//go:build simbug

package sim

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// TestPlanted runs only in a build in which the rules do not check again whether
// a plan fits: the simulator must find that, within five minutes.
func TestPlanted(t *testing.T) {
	start := time.Now()
	totals, err := Series(Config{Seed: firstSeed(t)}, func(Totals) bool { return time.Since(start) < 5*time.Minute })
	var f *Failure
	if !errors.As(err, &f) {
		t.Fatalf("the planted bug was not found in %d commands: %v", totals.Commands, err)
	}
	t.Logf("found after %s and %d commands: %v", time.Since(start), totals.Commands, f)
	if text := f.Error(); !strings.Contains(text, "is held twice") && !strings.Contains(text, "is given twice") {
		t.Errorf("what was found is something else: %v", f)
	}
}
