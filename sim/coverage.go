package sim

import (
	"maps"
	"slices"
	"strings"

	"github.com/rxvision/rxvision/cluster"
)

// Coverage counts what a run, or several, went through.
type Coverage struct {
	Kinds     map[string]Outcomes // by command
	Faults    map[string]int      // by name; all names of FaultKinds are there
	Messages  Messages
	Elections int
	Snapshots int // taken by servers
	Checks    int // of the whole state
	Hashes    int // that were compared
	Tasks     int // started on nodes
	Retries   int // requests that came to the log again and changed nothing
	Conflicts int // compare-and-sets that were refused
	Swaps     int // … that were not
	Gangs     int // placed
	Preempted int // allocations
	Moved     int // … of them, to make room for others
}

// Outcomes of one kind of command.
type Outcomes struct{ Done, Refused int }

// Messages between servers and of their callers; streams of nodes that broke.
type Messages struct{ Sent, Lost, Doubled, Streams int }

// FaultKinds names every fault that the simulator knows: those it injects, and
// those that follow from them.
var FaultKinds = append(names(injections), consequences...)

// consequences are faults that nobody injects directly.
var consequences = []string{
	"unsynced tail lost", "uncommitted entries cut off", "snapshot installed",
	"request retried", "request forwarded twice",
}

// CommandKinds names every command that package cluster knows.
func CommandKinds() (kinds []string) {
	for k := 1; k < 256; k++ {
		if c, err := cluster.DecodeCommand(append([]byte{byte(k)}, cluster.Marshal(&struct{}{})...)); err == nil {
			kinds = append(kinds, kindName(c))
		}
	}
	return kinds
}

func newCoverage() Coverage {
	c := Coverage{Kinds: map[string]Outcomes{}, Faults: map[string]int{}}
	for _, k := range CommandKinds() {
		c.Kinds[k] = Outcomes{}
	}
	for _, f := range FaultKinds {
		c.Faults[f] = 0
	}
	return c
}

func (c *Coverage) fault(name string) {
	if _, ok := c.Faults[name]; !ok {
		panic("fault " + name + " is not in FaultKinds")
	}
	c.Faults[name]++
}

// Injected counts the faults that were injected, without what follows from them
// and without single messages.
func (c *Coverage) Injected() (n int) {
	for _, f := range injections {
		n += c.Faults[f.name]
	}
	return n
}

// Missing lists the commands and faults that never happened.
func (c *Coverage) Missing() (missing []string) {
	for _, k := range slices.Sorted(maps.Keys(c.Kinds)) {
		if c.Kinds[k].Done == 0 {
			missing = append(missing, "command "+k)
		}
	}
	if c.Gangs == 0 {
		missing = append(missing, "gangs")
	}
	if c.Preempted == 0 {
		missing = append(missing, "preemption")
	}
	if c.Moved == 0 {
		missing = append(missing, "moves")
	}
	for _, f := range slices.Sorted(maps.Keys(c.Faults)) {
		if c.Faults[f] == 0 {
			missing = append(missing, "fault "+strings.TrimSpace(f))
		}
	}
	return missing
}

// Add counts another run in.
func (c *Coverage) Add(o Coverage) {
	if c.Kinds == nil {
		*c = newCoverage()
	}
	for k, v := range o.Kinds {
		c.Kinds[k] = Outcomes{c.Kinds[k].Done + v.Done, c.Kinds[k].Refused + v.Refused}
	}
	for k, v := range o.Faults {
		c.Faults[k] += v
	}
	for _, p := range []struct {
		to   *int
		from int
	}{
		{&c.Messages.Sent, o.Messages.Sent},
		{&c.Messages.Lost, o.Messages.Lost},
		{&c.Messages.Doubled, o.Messages.Doubled},
		{&c.Messages.Streams, o.Messages.Streams},
		{&c.Elections, o.Elections},
		{&c.Snapshots, o.Snapshots},
		{&c.Checks, o.Checks},
		{&c.Hashes, o.Hashes},
		{&c.Tasks, o.Tasks},
		{&c.Retries, o.Retries},
		{&c.Conflicts, o.Conflicts},
		{&c.Swaps, o.Swaps},
		{&c.Gangs, o.Gangs},
		{&c.Preempted, o.Preempted},
		{&c.Moved, o.Moved},
	} {
		*p.to += p.from
	}
}
