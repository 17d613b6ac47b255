package task

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// WritePayload writes the payload of a dispatched job into a file of the task's local
// directory, for the task's user alone: username, or the agent's own user when that is empty.
func WritePayload(dir Dir, file string, payload []byte, username string) error {
	uid, gid, err := owner(username)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(dir.Local())
	if err != nil {
		return err
	}
	defer root.Close()
	file = filepath.Clean(file)
	if !filepath.IsLocal(file) || file == "." {
		return fmt.Errorf("dispatch payload: file %q leads out of the task's local directory", file)
	}
	if err := root.MkdirAll(filepath.Dir(file), 0o777); err != nil {
		return fmt.Errorf("dispatch payload: %w", err)
	}
	err = errors.Join(root.WriteFile(file, payload, 0o600), root.Chmod(file, 0o600)) // it may be there, from a start that was cut off
	if err == nil && uid >= 0 {
		err = root.Chown(file, uid, gid)
	}
	if err != nil {
		return fmt.Errorf("dispatch payload: %w", err)
	}
	return nil
}
