package proc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
)

// Capabilities is what this machine allows, found by trying. Every reason is a sentence for an operator; it is empty when
// the thing works.
type Capabilities struct {
	CgroupParent  string // directory below which Spec.Cgroup may be; "" when there can be none
	CgroupReason  string
	Limits        bool // memory, CPU and process limits hold
	LimitsReason  string
	Isolation     bool // Spec.Isolation works
	IsolateReason string
	NoNetwork     bool // Spec.NoNetwork works
	NetworkReason string
	// Reattach: tasks outlive this process even when whoever supervises it (systemd, another Nomad) ends its whole group,
	// because they run in a group outside it.
	Reattach       bool
	ReattachReason string
}

// Probe tries what the machine allows by starting /bin/true in each way. parent is the name of the group for tasks below the
// cgroup v2 mount, e.g. "rxvision.slice"; "" tries no cgroups. Run it as the user that will start tasks; it takes about
// a tenth of a second.
func Probe(ctx context.Context, parent string) Capabilities {
	var c Capabilities
	reason := func(err error) string {
		if err == nil {
			return ""
		}
		return err.Error()
	}
	tree, limits := probeCgroup(ctx, parent, &c)
	c.Limits = limits == nil
	c.CgroupReason, c.LimitsReason = reason(tree), reason(limits)

	err := try(ctx, Spec{Isolation: &Isolation{}})
	c.Isolation, c.IsolateReason = err == nil, reason(err)
	err = try(ctx, Spec{NoNetwork: true})
	c.NoNetwork, c.NetworkReason = err == nil, reason(err)

	own, err := ownCgroup()
	if c.CgroupParent != "" || err != nil || own == "/" {
		c.Reattach = true // a group of their own, or none that could be ended as a whole
	} else {
		c.ReattachReason = fmt.Sprintf("tasks share cgroup %s with this process and end if it is ended as a whole: %s", own, c.CgroupReason)
	}
	return c
}

func probeCgroup(ctx context.Context, parent string, c *Capabilities) (tree, limits error) {
	if parent == "" {
		err := errors.New("no cgroup for tasks is configured")
		return err, err
	}
	mount, err := cgroupMount()
	if err != nil {
		return err, err
	}
	dir := filepath.Join(mount, parent)
	if tree, limits = prepareParent(dir); tree != nil {
		return tree, tree
	}
	group := filepath.Join(dir, "probe-"+strconv.Itoa(os.Getpid()))
	if err := try(ctx, Spec{Cgroup: group}); err != nil {
		return err, err
	}
	c.CgroupParent = dir
	if limits == nil {
		limits = try(ctx, Spec{Cgroup: group, Limits: Limits{MemoryBytes: 64 << 20, CPUShares: 100, PIDs: 100}})
	}
	return nil, limits
}

// try runs a program that does nothing the way spec says.
func try(ctx context.Context, spec Spec) error {
	spec.Path, spec.Env = "true", []string{}
	_, err := Output(ctx, spec)
	if cause := errors.Unwrap(err); cause != nil {
		return cause // what was started to find out does not matter
	}
	return err
}
