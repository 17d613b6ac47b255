package task

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
)

// Names inside an allocation's directory, as Nomad lays them out.
const (
	sharedName  = "alloc"
	logsName    = "logs"
	localName   = "local"
	secretsName = "secrets"
	tmpName     = "tmp"
)

// AllocDir is the directory of one allocation: alloc/ is shared by its tasks,
// every task has a directory of its own name beside it.
type AllocDir string

// Shared is what the tasks share (NOMAD_ALLOC_DIR).
func (a AllocDir) Shared() string { return filepath.Join(string(a), sharedName) }

// Logs holds the rotated logs of all tasks: TASK.stdout.N and TASK.stderr.N.
func (a AllocDir) Logs() string { return filepath.Join(a.Shared(), logsName) }

// Task gives the directories of one task.
func (a AllocDir) Task(name string) Dir { return Dir{alloc: a, name: name} }

// Build makes the shared directories.
func (a AllocDir) Build() error {
	if err := os.MkdirAll(string(a), 0o755); err != nil {
		return err
	}
	return makeOpen(a.Shared(), a.Logs(), filepath.Join(a.Shared(), "data"), filepath.Join(a.Shared(), tmpName))
}

// SecretsPath reports whether a path relative to an allocation's directory lies
// in a task's secrets directory.
func SecretsPath(rel string) bool {
	parts := strings.Split(filepath.ToSlash(filepath.Clean(rel)), "/")
	return len(parts) > 1 && parts[0] != sharedName && parts[1] == secretsName
}

// Dir is a task's directory.
type Dir struct {
	alloc AllocDir
	name  string
}

// Root is the task's directory, where it starts.
func (d Dir) Root() string { return filepath.Join(string(d.alloc), d.name) }

// Local is private to the task (NOMAD_TASK_DIR).
func (d Dir) Local() string { return filepath.Join(d.Root(), localName) }

// Secrets is private to the task and never shown by the file API (NOMAD_SECRETS_DIR).
func (d Dir) Secrets() string { return filepath.Join(d.Root(), secretsName) }

// Tmp is the task's scratch directory.
func (d Dir) Tmp() string { return filepath.Join(d.Root(), tmpName) }

// Shared is the allocation's shared directory.
func (d Dir) Shared() string { return d.alloc.Shared() }

// Logs is where the task's logs go.
func (d Dir) Logs() string { return d.alloc.Logs() }

// CheckName refuses a task name that cannot be a directory beside alloc/.
func CheckName(name string) error {
	switch {
	case name == "" || name == "." || name == ".." || name == sharedName:
		return fmt.Errorf("task name %q is reserved", name)
	case strings.ContainsFunc(name, func(r rune) bool { return r == '/' || r == '\\' || r < ' ' }) || len(name) > 128:
		return fmt.Errorf("task name %q cannot be a directory: no slashes or control characters, at most 128 bytes", name)
	}
	return nil
}

// Build makes the task's directories. The secrets directory belongs to username,
// or to the agent's own user when that is empty.
func (d Dir) Build(username string) error {
	if err := CheckName(d.name); err != nil {
		return err
	}
	if err := makeOpen(d.Root(), d.Local(), d.Tmp()); err != nil {
		return err
	}
	if err := os.MkdirAll(d.Secrets(), 0o700); err != nil {
		return err
	}
	uid, gid, err := owner(username)
	if err != nil || uid < 0 {
		return err
	}
	return os.Chown(d.Secrets(), uid, gid)
}

// owner finds whom a task's private files are given to: -1 for nobody else, since the task
// runs as the agent's own user, or the agent may not give files away.
func owner(username string) (uid, gid int, err error) {
	if username == "" || os.Geteuid() != 0 {
		return -1, -1, nil
	}
	u, err := user.Lookup(username)
	if err != nil {
		return -1, -1, fmt.Errorf("user %q: %w", username, err)
	}
	uid, err1 := strconv.Atoi(u.Uid)
	gid, err2 := strconv.Atoi(u.Gid)
	return uid, gid, errors.Join(err1, err2)
}

// makeOpen makes directories that every user of the host may write, as Nomad's
// are: tasks of one allocation may run as different users.
func makeOpen(dirs ...string) error {
	for _, d := range dirs {
		if err := os.MkdirAll(d, 0o777); err != nil {
			return err
		}
		if err := os.Chmod(d, 0o777); err != nil {
			return err
		}
	}
	return nil
}

// rel turns a destination of an artifact or template into a path relative to the
// task's directory. Absolute paths inside it are taken as they are, others as
// relative to it, as Nomad does.
func (d Dir) rel(dest string) (string, error) {
	p := filepath.Clean(dest)
	if filepath.IsAbs(p) {
		if in, err := filepath.Rel(d.Root(), p); err == nil && filepath.IsLocal(in) {
			p = in
		} else {
			p = p[1:]
		}
	}
	if !filepath.IsLocal(p) {
		return "", fmt.Errorf("destination %q leads out of the task's directory", dest)
	}
	return p, nil
}
