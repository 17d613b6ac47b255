package task

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/rxvision/rxvision/proc"
)

// The test binary is also the tasks' programs: with "worker" as first argument it
// plays a model server.
func TestMain(m *testing.M) {
	proc.Main()
	if len(os.Args) > 1 && os.Args[1] == "worker" {
		os.Exit(fakeWorker(os.Args[2:]))
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		for _, mount := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
			_ = os.Remove(filepath.Join(mount, testCgroup)) // stays if a test left something in it
		}
		os.Exit(code)
	}))
}

// testCgroup is where the tasks of this test process live, apart from those of
// others on the machine.
var testCgroup = fmt.Sprintf("rxvision-test-%d.slice", os.Getpid())

func flagValue(args []string, name string) string {
	if i := slices.Index(args, name); i >= 0 && i+1 < len(args) {
		return args[i+1]
	}
	return ""
}

// fakeWorker serves /v2/health/ready, its arguments and its environment, or with
// -check answers as the model file tells it to.
func fakeWorker(args []string) int {
	model, err := os.ReadFile(flagValue(args, "-file"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if slices.Contains(args, "-check") {
		switch text := string(model); {
		case strings.HasPrefix(text, "refuse:"):
			_ = json.NewEncoder(os.Stdout).Encode(map[string]string{"error": strings.TrimPrefix(text, "refuse:")})
			return 3
		case text == "who":
			_ = json.NewEncoder(os.Stdout).Encode(map[string]string{"error": fmt.Sprint("uid ", os.Getuid())})
			return 3
		case text == "flood":
			for range 100_000 {
				fmt.Println("so much to say")
			}
			return 0
		case text == "garble":
			fmt.Println("not json")
			return 0
		}
		fmt.Println(`{"platform":"onnxruntime_onnx","inputs":[{"name":"x","datatype":"FP32","shape":[-1,4]}],"outputs":[{"name":"y","datatype":"FP32","shape":[-1,2]}],"properties":{"labels":"a,b"}}`)
		return 0
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/v2/health/ready", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("/self", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(map[string]any{"args": args, "env": os.Environ()})
	})
	fmt.Fprintln(os.Stderr, http.ListenAndServe(flagValue(args, "-listen"), mux))
	return 1
}
