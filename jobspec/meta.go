package jobspec

import (
	"slices"
	"strconv"
	"strings"

	"github.com/rxvision/rxvision/cluster"
)

// level is where in a job a block stands.
type level string

const (
	levelJob       level = "job"
	levelGroup     level = "group"
	levelTask      level = "task"
	levelDevice    level = "device"
	levelNamespace level = "namespace"

	levelJobOrGroup level = "job or group" // what stands at the job is for all of its groups that say nothing
)

// covers says whether what belongs to l may stand at the level at.
func (l level) covers(at level) bool {
	return l == at || l == levelJobOrGroup && (at == levelJob || at == levelGroup)
}

// metaPrefix starts the meta keys that speak to rxvision: what Nomad's dialect has
// no word for. All other keys are the user's own.
const metaPrefix = "rx_"

// metaKeys is the table of all rx_ keys: what each means and which block it
// belongs to.
var metaKeys = map[string]level{
	"rx_gang":                 levelGroup,      // "true": all allocations of the group are placed, or none; see gang.go
	"rx_max_run_duration":     levelGroup,      // a duration from the start of its main tasks after which an allocation is ended, and has failed
	"rx_movable":              levelGroup,      // whether an allocation may be moved to another node to make room
	"rx_min_runtime":          levelGroup,      // a duration from the start in which an allocation is not preempted
	"rx_preempt_grace":        levelGroup,      // a duration between notice and kill when preempted, 30s by default
	"rx_preempt_signal":       levelGroup,      // the signal of the notice, SIGTERM by default
	"rx_preemptible":          levelGroup,      // "false": nothing preempts it; "true": what it borrows may be taken back by equals
	"rx_topology":             levelGroup,      // of a gang: node, ${meta.rack}, …: what its members are to share, the narrowest first
	"rx_topology_required":    levelGroup,      // "true": they wait until they can
	cluster.MetaMaxParallel:   levelJob,        // of a parameterized job: how many of its children run at a time
	cluster.MetaCohort:        levelNamespace,  // the namespaces that lend each other what they leave of their quotas
	cluster.MetaBorrowPercent: levelNamespace,  // how far beyond its quota it may go, in percent; without: as far as others lend
	cluster.MetaLendPercent:   levelNamespace,  // how much of its quota it lends, in percent; without: all
	cluster.MetaSpot:          levelJobOrGroup, // whether the work goes to spot nodes: never (the default), allow, require
}

var spotValues = []string{cluster.SpotNever, cluster.SpotAllow, cluster.SpotRequire}

func (c *checker) meta(in map[string]string, path string, at level) map[string]string {
	for _, key := range sortedKeys(in) {
		if !strings.HasPrefix(key, metaPrefix) {
			continue
		}
		belongs, ok := metaKeys[key]
		switch {
		case !ok:
			names := sortedKeys(metaKeys)
			c.fault(join(path, key), "unknown key %s%s%s", quote(key), didYouMean(key, names), known(names))
		case !belongs.covers(at):
			c.fault(join(path, key), "belongs in the meta block of the %s, not of the %s", belongs, at)
		case key == cluster.MetaSpot && !slices.Contains(spotValues, in[key]):
			c.fault(join(path, key), "%s is not a value of it%s%s", quote(in[key]), didYouMean(in[key], spotValues), known(spotValues))
		}
	}
	return cloneMap(in)
}

// NamespaceMeta lists what is wrong with the keys of a namespace's meta that speak to rxvision. Their values are
// the state's to judge.
func NamespaceMeta(in map[string]string) (faults []string) {
	c := &checker{}
	c.meta(in, "meta", levelNamespace)
	for _, f := range c.faults {
		faults = append(faults, f.Path+": "+f.Text)
	}
	return faults
}

// maxParallel checks the bound on a job's children.
func (c *checker) maxParallel(j *cluster.Job) {
	text, there := j.Meta[cluster.MetaMaxParallel]
	if !there {
		return
	}
	at := join("meta", cluster.MetaMaxParallel)
	if n, err := strconv.Atoi(text); err != nil || n < 1 || n > cluster.MaxParallel {
		c.fault(at, "%s is no number from 1 to %d", quote(text), cluster.MaxParallel)
	}
	if j.ParameterizedJob == nil {
		c.fault(at, "is for jobs with a parameterized block: it bounds how many of their children run at a time")
	}
}
