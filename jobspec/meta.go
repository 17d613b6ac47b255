package jobspec

import (
	"strings"
)

// level is where in a job a block stands.
type level string

const (
	levelJob    level = "job"
	levelGroup  level = "group"
	levelTask   level = "task"
	levelDevice level = "device"
)

// metaPrefix starts the meta keys that speak to rxvision: what Nomad's dialect has
// no word for. All other keys are the user's own.
const metaPrefix = "rx_"

// metaKeys is the table of all rx_ keys: what each means and which block it
// belongs to. One that is not supported yet is refused rather than ignored.
var metaKeys = map[string]struct {
	level     level
	supported bool
}{
	"rx_gang":             {levelGroup, false}, // "true": all allocations of the group are placed, or none
	"rx_max_run_duration": {levelGroup, false}, // a duration after which an allocation is stopped
	"rx_preempt_grace":    {levelGroup, false}, // a duration between notice and kill when preempted
	"rx_queue":            {levelJob, false},   // the queue that the job waits in
}

func (c *checker) meta(in map[string]string, path string, at level) map[string]string {
	for _, key := range sortedKeys(in) {
		if !strings.HasPrefix(key, metaPrefix) {
			continue
		}
		entry, ok := metaKeys[key]
		switch {
		case !ok:
			names := sortedKeys(metaKeys)
			c.fault(join(path, key), "unknown key %s%s%s", quote(key), didYouMean(key, names), known(names))
		case entry.level != at:
			c.fault(join(path, key), "belongs in the meta block of the %s, not of the %s", entry.level, at)
		case !entry.supported:
			c.fault(join(path, key), notYet)
		}
	}
	return cloneMap(in)
}
