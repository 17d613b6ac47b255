package gateway

import (
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/rxvision/rxvision/fleet/pb"
)

// TestUselessKeptRoutes starts on files that a crash or another version left: the
// gateway knows nothing, and says so, until a server tells it.
func TestUselessKeptRoutes(t *testing.T) {
	foreign, err := proto.Marshal(&pb.RoutesUpdate{Full: true, Models: []*pb.ModelRoute{
		{Name: "m", Versions: []*pb.VersionRoute{{Version: 1, Record: []byte("no record")}}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{"empty": nil, "torn": foreign[:len(foreign)/2], "foreign": foreign} {
		file := filepath.Join(t.TempDir(), "routes.pb")
		if err := os.WriteFile(file, content, 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := newRouter(file)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if r.current.Load().known || len(r.routes) > 0 {
			t.Errorf("%s: routes are known from it", name)
		}
	}
}
