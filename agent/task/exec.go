package task

import (
	"context"
	"errors"
	"os"
	"os/user"
	"path/filepath"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/proc"
)

// commandConfig is the config block of raw_exec and exec.
type commandConfig struct {
	Command string   `json:"command"`
	Args    []string `json:"args"`
	WorkDir string   `json:"work_dir"`
}

// command reads the config block; a relative work_dir is below the task's directory.
func (c *Config) command() (commandConfig, error) {
	var cfg commandConfig
	if err := c.Env.Decode(c.Task.Config, &cfg); err != nil {
		return cfg, err
	}
	if cfg.Command == "" {
		return cfg, errors.New("config: command is missing")
	}
	switch {
	case cfg.WorkDir == "":
		cfg.WorkDir = c.Dir.Root()
	case !filepath.IsAbs(cfg.WorkDir):
		cfg.WorkDir = filepath.Join(c.Dir.Root(), cfg.WorkDir)
	}
	return cfg, nil
}

func (c *Config) state(driver string) State {
	return State{Driver: driver, AllocID: c.Alloc.ID, Task: c.Task.Name}
}

// rawExec runs commands without isolation.
type rawExec struct{ d *Drivers }

func (r *rawExec) Fingerprint() *cluster.DriverInfo {
	if !r.d.opts.RawExec {
		return undetected("disabled: enable raw_exec in the agent's configuration to allow jobs to run any command")
	}
	return r.d.healthy(DriverRawExec)
}

func (r *rawExec) Start(_ context.Context, c *Config) (Handle, error) {
	if !r.d.opts.RawExec {
		return nil, errors.New("raw_exec is disabled on this node")
	}
	cfg, err := c.command()
	if err != nil {
		return nil, err
	}
	spec := r.d.spec(c, cfg.Command, cfg.Args)
	spec.Dir = cfg.WorkDir
	return handle(startProcess(spec, c.state(DriverRawExec), c.Keep, nil))
}

func (r *rawExec) Recover(_ context.Context, s State) (Handle, error) {
	return handle(recoverProcess(s, nil))
}

// handle keeps a nil *process from becoming a Handle.
func handle(p *process, err error) (Handle, error) {
	if err != nil {
		return nil, err
	}
	return p, nil
}

// isolatedExec runs commands in namespaces of their own.
type isolatedExec struct{ d *Drivers }

func (x *isolatedExec) Fingerprint() *cluster.DriverInfo {
	if !x.d.host.Isolation {
		return undetected("this host cannot isolate tasks: " + x.d.host.IsolateReason)
	}
	return x.d.healthy(DriverExec)
}

func (x *isolatedExec) Start(_ context.Context, c *Config) (Handle, error) {
	if !x.d.host.Isolation {
		return nil, errors.New("this host cannot isolate tasks: " + x.d.host.IsolateReason)
	}
	if u, err := user.Lookup(User(c.Task)); err == nil && u.Uid == "0" {
		return nil, errors.New("running as root is not allowed with the exec driver")
	}
	if c.Env.vars["HOME"] == os.Getenv("HOME") {
		c.Env.vars["HOME"] = c.Dir.Root() // the agent's own is not the task's
	}
	if c.Env.vars["TMPDIR"] == c.Dir.Tmp() {
		c.Env.vars["TMPDIR"] = "/tmp"
	}
	cfg, err := c.command()
	if err != nil {
		return nil, err
	}
	spec := x.d.spec(c, cfg.Command, cfg.Args)
	spec.Dir = cfg.WorkDir
	spec.Isolation = &proc.Isolation{
		Writable: []string{c.Dir.Root(), c.Dir.Shared()},
		Hidden:   x.d.opts.Hidden,
		Tmp:      c.Dir.Tmp(),
	}
	return handle(startProcess(spec, c.state(DriverExec), c.Keep, nil))
}

func (x *isolatedExec) Recover(_ context.Context, s State) (Handle, error) {
	return handle(recoverProcess(s, nil))
}

// User is who a task runs as: "" means the agent's own user.
func User(t *cluster.Task) string {
	if t.User == "" && t.Driver == DriverExec {
		return "nobody"
	}
	return t.User
}
