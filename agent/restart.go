package agent

import (
	"fmt"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// Modes of a restart policy.
const (
	modeFail  = "fail"
	modeDelay = "delay"
)

// Restart delays grow with each restart in the policy's interval, from the
// policy's own up to maxRestartDelay (or the policy's, if that is longer), and
// are spread by a quarter, so that what crashes together does not come back together.
const (
	maxRestartDelay = 5 * time.Minute
	restartJitter   = 0.25
)

// Reasons as Nomad words them.
const (
	reasonWithinPolicy  = "Restart within policy"
	reasonNoRestarts    = "Policy allows no restarts"
	reasonUnrecoverable = "Error was unrecoverable"
	reasonDelay         = "Exceeded allowed attempts, applying a delay"
)

// verdict is what follows the end of a run.
type verdict struct {
	restart bool
	delay   time.Duration
	reason  string
	failed  bool // the task has failed for good
}

// outcome is how a run ended, as far as restarts go.
type outcome int

const (
	succeeded     outcome = iota // exit code 0
	broke                        // it failed, or could not be prepared: another try may help
	unrecoverable                // it could not be started and will not be by trying again
)

// decide applies a restart policy to the end of a run and counts the restart in
// t. Batch work that succeeded is done; a service is restarted even then. random
// is from [0,1).
func decide(p *cluster.RestartPolicy, jobType string, how outcome, t *localTask, now time.Time, random float64) verdict {
	switch {
	case how == succeeded && (jobType == cluster.JobTypeBatch || jobType == cluster.JobTypeSysBatch):
		return verdict{}
	case how == unrecoverable:
		return verdict{reason: reasonUnrecoverable, failed: true}
	case p == nil || (p.Attempts == 0 && p.Mode != modeDelay):
		return verdict{reason: reasonNoRestarts, failed: true}
	}
	window := time.Unix(0, t.Window)
	if t.Window == 0 || now.Sub(window) > p.Interval {
		window = now
		t.Window, t.Count = now.UnixNano(), 0
	}
	if t.Count >= p.Attempts {
		if p.Mode != modeDelay {
			return verdict{reason: fmt.Sprintf(`Exceeded allowed attempts %d in interval %s and mode is "fail"`, p.Attempts, p.Interval), failed: true}
		}
		t.Window, t.Count = window.Add(p.Interval).UnixNano(), 0
		wait := max(window.Add(p.Interval).Sub(now), 0)
		return verdict{restart: true, delay: spread(wait+p.Delay, random), reason: reasonDelay}
	}
	delay := p.Delay
	for i := 0; i < t.Count && delay < maxRestartDelay; i++ {
		delay *= 2
	}
	t.Count++
	return verdict{restart: true, delay: spread(min(delay, max(maxRestartDelay, p.Delay)), random), reason: reasonWithinPolicy}
}

func spread(d time.Duration, random float64) time.Duration {
	return d + time.Duration(float64(d)*restartJitter*random)
}
